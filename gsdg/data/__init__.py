"""Images by domain: what one is (domains, images), where they come from (folders, digits, mnist), which of them train
(split), what is made of them (augment, or cache and batched), and how they come to the device (loader). On disk, before
any run: prepare, published, verify, show, with `python -m gsdg.data`.

A source of data is a class with `name`, `domains: list[str]`, `augment`, `channels`, `cache` and
`read() -> DomainDataset`; building one is cheap, reading it lists the disk. Nothing here knows of models or surgery.
"""
