"""What each data set is made of: its sources in order of preference, and how a tree comes out of what they give.

Addresses are DomainBed's (domainbed/scripts/download.py) where no other is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from gsdg.data.prepare import parquet, terra
from gsdg.data.prepare.disk import Unusable
from gsdg.data.prepare.mnist import Mnist
from gsdg.data.prepare.sources import Item, Source, drive, hub
from gsdg.data.prepare.trees import Spellings, copy_tree, count, described, files, find_tree
from gsdg.data.published import count_faults
from gsdg.errors import UserError, listing


class Recipe(Protocol):
    """`places` are folders or files, as they were downloaded, given or unpacked; `tree` is where to build."""

    sources: tuple[Source, ...]
    archives: tuple[str, ...]  # patterns of names that archives go by elsewhere
    model: str  # one that runs on it, for the report

    def build(self, places: Sequence[Path], tree: Path) -> list[str]:
        """Make `tree`; lines for the report. Unusable, before anything is written: the parts are not in `places`."""

    def inspect(self, name: str, tree: Path) -> tuple[str, list[str]]:
        """What `tree` holds, in words, and a line for each difference from what is published of data set `name`."""


@dataclass(frozen=True)
class Images:
    """Trees of <domain>/<class>/<image>. `labels` renames classes; `without` lists images that are to be left out."""

    sources: tuple[Source, ...]
    domains: Spellings
    labels: Mapping[str, str] = field(default_factory=dict)
    without: Item | None = None
    archives: tuple[str, ...] = ()
    model: str = "resnet18"

    def build(self, places: Sequence[Path], tree: Path) -> list[str]:
        left_out = self._left_out(places)
        if found := find_tree(places, self.domains):
            number = copy_tree(found, tree, self.labels, left_out)
            return [f"{number:,} of the {len(left_out):,} files in {self.without.name} left out"] if left_out else []
        return self._build_otherwise(places, tree)

    def _build_otherwise(self, places: Sequence[Path], tree: Path) -> list[str]:
        if (shards := parquet.shards_in(places)) and not self.without:
            return parquet.build(shards, self.domains, self.labels, tree)
        raise Unusable(
            f"no folder that holds {listing(self.domains)} found in {described(places)}. "
            "--from takes an archive, a folder with it in, or the folders unpacked."
        )

    def _left_out(self, places: Sequence[Path]) -> set[str]:
        if self.without is None:
            return set()
        lists = [path for path in files(places, (".txt",)) if path.name == self.without.name]
        if not lists:
            raise UserError(
                f"{self.without.name} is not in {described(places)}. It lists the duplicates that DomainBed leaves "
                f"out. Get it from {self.without.url} and put it into the folder that --from names, beside the rest."
            )
        return set(lists[0].read_text().split())

    def inspect(self, name: str, tree: Path) -> tuple[str, list[str]]:
        counts = count(tree)
        totals = {domain: sum(labels.values()) for domain, labels in counts.items()}
        every = sorted({label for labels in counts.values() for label in labels})
        said = f"{sum(totals.values()):,} images, {len(every)} classes: " + listing(
            f"{domain} {total:,}" for domain, total in totals.items()
        )
        lacking = {domain: [label for label in every if not labels.get(label)] for domain, labels in counts.items()}
        lacks = [f"{domain}: no images of {listing(labels[:5])}" for domain, labels in lacking.items() if labels]
        return said, count_faults(name, counts) + lacks


class Terra(Images):
    """Also from photographs and annotations."""

    def _build_otherwise(self, places: Sequence[Path], tree: Path) -> list[str]:
        if parquet.shards_in(places):
            return super()._build_otherwise(places, tree)
        return terra.build(places, tree)


def _drive(key: str, name: str) -> Source:
    return Source("drive", (Item(f"https://drive.google.com/uc?id={key}", name),), drive)


def _hub(repository: str, size: int) -> Source:
    return Source("huggingface", (Item(f"https://huggingface.co/datasets/{repository}", "*.parquet", size=size),), hub)


def _domains(*names: str) -> Spellings:
    return dict.fromkeys(names, ())


CAMERA_TRAPS = "https://storage.googleapis.com/public-datasets-lila/caltechcameratraps/"
VISDA = "http://csr.bu.edu/ftp/visda/2019/multi-source/"
DUPLICATES = Item(
    "https://raw.githubusercontent.com/facebookresearch/DomainBed/main/domainbed/misc/domain_net_duplicates.txt",
    "domain_net_duplicates.txt",
    "a52b4ab70203f4f3df381077694dba3e33ff44c26407e1c5faca76919c702770",
    365_663,
)
DOMAINNET = ("groundtruth/clipart", "infograph", "groundtruth/painting", "quickdraw", "real", "sketch")

RECIPES: dict[str, Recipe] = {
    "pacs": Images(
        # Sizes on Hugging Face are its data cards'.
        (_drive("1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd", "PACS.zip"), _hub("flwrlabs/pacs", 191_395_900)),
        _domains("art_painting", "cartoon", "photo", "sketch"),
    ),
    "vlcs": Images(
        (_drive("1skwblH1_okBwxWxmRsp9_qi15hyPpxg8", "VLCS.tar.gz"),),
        {"Caltech101": ("CALTECH",), "LabelMe": (), "SUN09": ("SUN",), "VOC2007": ("PASCAL", "VOC")},
        {"0": "bird", "1": "car", "2": "chair", "3": "dog", "4": "person"},
    ),
    "officehome": Images(
        (
            _drive("1uY0pj7oFsjMxRwaD3Sxy0jgel0fsYXLC", "office_home.zip"),
            _hub("flwrlabs/office-home", 1_158_984_115),
        ),
        _domains("Art", "Clipart", "Product", "Real World"),
        archives=("OfficeHomeDataset*",),
    ),
    "terraincognita": Terra(
        (
            Source(
                "lila",
                tuple(
                    Item(CAMERA_TRAPS + name, name)
                    for name in ("eccv_18_all_images_sm.tar.gz", "eccv_18_annotations.tar.gz")
                ),
            ),
        ),
        _domains("location_100", "location_38", "location_43", "location_46"),
        archives=("caltech_camera_traps*", "caltech_images_*"),
    ),
    "domainnet": Images(
        (
            Source(
                "bu",
                (DUPLICATES, *(Item(f"{VISDA}{path}.zip", f"{path.rpartition('/')[2]}.zip") for path in DOMAINNET)),
            ),
        ),
        _domains("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
        without=DUPLICATES,
    ),
    "rotated_mnist": Mnist("convnet"),
    "colored_mnist": Mnist("convnet_2ch"),
}
