"""Images by domain: what one is (domains), where they come from (folders, digits), then split, augment, loader.

A source of data is a class with `name`, `domains: list[str]`, `augment` and `read() -> DomainDataset`; building one is
cheap, reading it lists the disk. Nothing here knows of models or surgery.
"""
