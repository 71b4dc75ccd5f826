"""The recipe of each dataset: its sources in order of preference, and how to build its tree from their files.

Unless stated otherwise, addresses are those of DomainBed (domainbed/scripts/download.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from gsdg.data.download import dassl, parquet, spawrious, terra, wilds
from gsdg.data.download.disk import Unusable
from gsdg.data.download.listed import Listed
from gsdg.data.download.mnist import Mnist
from gsdg.data.download.sources import Item, Source, drive, drive_or_http, hub
from gsdg.data.download.trees import Spellings, copy_tree, count_images, files, find_tree, list_contents
from gsdg.data.published_counts import count_faults
from gsdg.utils.errors import UserError, listing


class Recipe(Protocol):
    """How to get and build a dataset."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where it is published, in order of preference."""
        ...

    @property
    def archives(self) -> tuple[str, ...]:
        """Patterns of the names under which other sites publish its archives."""
        ...

    @property
    def model(self) -> str:
        """A model that suits it, for the command in the report."""
        ...

    def build(self, places: Sequence[Path], tree: Path) -> list[str]:
        """Build the dataset.

        Args:
            places: folders or files, as they were downloaded, given by the user, or unpacked.
            tree: the folder to build.

        Returns: lines for the report.

        Raises:
            Unusable: `places` do not contain the needed files; nothing was written.
        """

    def inspect(self, name: str, tree: Path) -> tuple[str, list[str]]:
        """Summarize `tree` in a line, and compare it with the published numbers of dataset `name`.

        Returns: (summary, one line per difference).
        """


@dataclass(frozen=True)
class Images:
    """The recipe of a tree <domain>/<class>/<image>, from folders or from Parquet files.

    Args:
        sources: where it is published.
        domains: its domains, with other spellings of their names.
        labels: {class name in the source: class name in the tree}; other classes keep their names.
        without: a file that lists images to leave out.
        archives: see `Recipe`.
        model: see `Recipe`.
    """

    sources: tuple[Source, ...]
    domains: Spellings
    labels: Mapping[str, str] = field(default_factory=dict)
    without: Item | None = None
    archives: tuple[str, ...] = ()
    model: str = "resnet18"

    def build(self, places: Sequence[Path], tree: Path) -> list[str]:
        excluded = self._excluded(places)
        if domain_folders := find_tree(places, self.domains):
            number = copy_tree(domain_folders, tree, self.labels, excluded)
            if self.without and excluded:
                return [f"{number:,} of the {len(excluded):,} files in {self.without.name} left out"]
            return []
        return self._build_without_folders(places, tree)

    def _build_without_folders(self, places: Sequence[Path], tree: Path) -> list[str]:
        if (shards := parquet.shards_in(places)) and not self.without:
            return parquet.build(shards, self.domains, self.labels, tree)
        raise Unusable(
            f"no folder that holds {listing(self.domains)} found in {list_contents(places)}. "
            "--from takes an archive, a folder with the archive in it, or the unpacked folders."
        )

    def _excluded(self, places: Sequence[Path]) -> set[str]:
        """The paths in the file `without`. UserError: the file is not in `places`."""
        if self.without is None:
            return set()
        lists = [path for path in files(places, (".txt",)) if path.name == self.without.name]
        if not lists:
            raise UserError(
                f"{self.without.name} is not in {list_contents(places)}. It lists the duplicates that DomainBed leaves "
                f"out. Get it from {self.without.url} and put it into the folder that --from names, beside the rest."
            )
        return set(lists[0].read_text().split())

    def inspect(self, name: str, tree: Path) -> tuple[str, list[str]]:
        counts = count_images(tree)
        totals = {domain: sum(by_class.values()) for domain, by_class in counts.items()}
        classes = sorted({label for by_class in counts.values() for label in by_class})
        summary = f"{sum(totals.values()):,} images, {len(classes)} classes: " + listing(
            f"{domain} {total:,}" for domain, total in totals.items()
        )
        lacking = {domain: [y for y in classes if not by_class.get(y)] for domain, by_class in counts.items()}
        lacks = [f"{domain}: no images of {listing(labels[:5])}" for domain, labels in lacking.items() if labels]
        return summary, count_faults(name, counts) + lacks


class Terra(Images):
    """As Images, and also from camera trap photographs and their annotations."""

    def _build_without_folders(self, places: Sequence[Path], tree: Path) -> list[str]:
        if parquet.shards_in(places):
            return super()._build_without_folders(places, tree)
        return terra.build(places, tree)


def _drive(key: str, name: str, source: str = "drive") -> Source:
    return Source(source, (Item(DRIVE + key, name),), drive)


def _tsinghua(**keys: str) -> Source:
    """A copy of the Transfer-Learning-Library (github.com/thuml/Transfer-Learning-Library, tllib/vision/datasets).

    keys: {domain: key of its archive}.
    """
    items = [Item(f"https://cloud.tsinghua.edu.cn/f/{key}/?dl=1", f"{domain}.tgz") for domain, key in keys.items()]
    return Source("tsinghua", tuple(items))


def _spawrious(name: str) -> Listed:
    """A challenge of Spawrious; addresses are those of its README and its package."""
    challenge, whole = spawrious.CHALLENGES[name], ("entire_dataset", "hofkueo8qvaqlp3")
    own = {"o2o_easy": "kwhiv60ihxe3owy", "o2o_medium": "x03gkhdwar5kht4", "o2o_hard": "p1ry121m2gjj158"}
    archives = [(name, own[name]), whole] if name in own else [whole]
    sources = [
        Source(source, (Item(f"{DROPBOX}/s/{key}/{file}?dl=1", file),))
        for source, key in archives
        for file in [f"spawrious224__{source}.tar.gz"]
    ]
    return Listed(
        tuple(sources),
        challenge.contents,
        challenge.rows,
        "split.target=Test",
        archives=("spawrious*.tar.gz",),
        model="resnet50",
    )


def _hub(repository: str, size: int) -> Source:
    return Source("huggingface", (Item(f"{HUB}/{repository}", "*.parquet", size=size),), hub)


def _codalab(bundle: str, name: str, size: int) -> Source:
    """WILDS' own address of a release. In 2026 it was down for months: github.com/p-lambda/wilds/issues/174 and 175."""
    url = f"https://worksheets.codalab.org/rest/bundles/{bundle}/contents/blob/"
    return Source("codalab", (Item(url, f"{name}.tar.gz", size=size),))


def _domains(*names: str) -> Spellings:
    return dict.fromkeys(names, ())


DRIVE, DROPBOX = "https://drive.google.com/uc?id=", "https://www.dropbox.com"
HUB = "https://huggingface.co/datasets"
SVIRO = "sviro_grayscale_rectangle_classification"
NICO = "u2bq2xo8sbax4pr/AACvgYpfQHfS7u_M3yJwkK-ra"
IWILDCAM = "iwildcam_v2.0.tar.gz"
CAMERA_TRAPS = "https://storage.googleapis.com/public-datasets-lila/caltechcameratraps/"
VISDA = "http://csr.bu.edu/ftp/visda/2019/multi-source/"
DUPLICATES = Item(
    "https://raw.githubusercontent.com/facebookresearch/DomainBed/main/domainbed/misc/domain_net_duplicates.txt",
    "domain_net_duplicates.txt",
    "a52b4ab70203f4f3df381077694dba3e33ff44c26407e1c5faca76919c702770",
    365_663,
)
MINI_DOMAINNET = ("groundtruth/clipart", "groundtruth/painting", "real", "sketch")
DOMAINNET = ("groundtruth/clipart", "infograph", "groundtruth/painting", "quickdraw", "real", "sketch")

# Sizes on Hugging Face are its data cards'. Sources `drive_2025` are the copies that were offered on 2025-11-23 in
# github.com/facebookresearch/DomainBed/issues/165, because DomainBed's own failed; it does not say whether they are zip
# or tar. Sources `dassl` are Dassl's (dassl/data/datasets/dg), with other folders. None of them could be tried here.
RECIPES: dict[str, Recipe] = {
    "pacs": Images(
        (
            _drive("1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd", "PACS.zip"),
            _drive("1WWi9tuUNFmUiw7Eirq_JT_hxYZv3J-Vv", "PACS.zip", "drive_2025"),
            _drive("1m4X4fROCCXMO0lRLrr6Zz9Vb3974NWhE", "pacs.zip", "dassl"),
            _tsinghua(
                art_painting="46684292e979402b8d87",
                cartoon="7bfa413b34ec4f4fa384",
                photo="45f71386a668475d8b42",
                sketch="4ba559535e4b4b6981e5",
            ),
            _hub("flwrlabs/pacs", 191_395_900),
        ),
        _domains("art_painting", "cartoon", "photo", "sketch"),
    ),
    "vlcs": Images(
        (
            _drive("1skwblH1_okBwxWxmRsp9_qi15hyPpxg8", "VLCS.tar.gz"),
            _drive("1yDuLrJdPSvMbTmpq-7XmwG0HnJengD-T", "VLCS.zip", "drive_2025"),
            _drive("1r0WL5DDqKfSPp9E3tRENwHaXNs1olLZd", "vlcs.zip", "dassl"),
        ),
        {"Caltech101": ("CALTECH",), "LabelMe": (), "SUN09": ("SUN",), "VOC2007": ("PASCAL", "VOC")},
        {"0": "bird", "1": "car", "2": "chair", "3": "dog", "4": "person"},
    ),
    "officehome": Images(
        (
            _drive("1uY0pj7oFsjMxRwaD3Sxy0jgel0fsYXLC", "office_home.zip"),
            _drive("1USXqK4nCvOAR5Ty4iwKcuCOrRJoRuDyU", "office_home.zip", "drive_2025"),
            _tsinghua(
                Art="6a006656b9a14567ade2",
                Clipart="ae88aa31d2d7411dad79",
                Product="f219b0ff35e142b3ab48",
                Real_World="6c19f3f15bb24ed3951a",
            ),
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
    # Addresses and sizes are those of WILDS' package (github.com/p-lambda/wilds, 4726775).
    "camelyon17": Listed(
        (_codalab("0xe45e15f39fb54e9d9e919556af67aabe", "camelyon17_v1.0", 10_658_709_504),),
        ("metadata.csv", "patches"),
        wilds.camelyon17,
        "split=from_list split.target=center_2 'dataset.domains=[center_0,center_2,center_3,center_4]'",
        model="resnet50",
    ),
    "iwildcam": Listed(
        (
            _codalab("0x6313da2b204647e79a14b468131fcd64", "iwildcam_v2.0", 11_957_420_032),
            # From FARBench's script for iWildCam, which calls it a mirror of this archive.
            Source("farbench", (Item(f"{HUB}/FARBench/iwildcam-wilds-v2/resolve/main/{IWILDCAM}", IWILDCAM),)),
        ),
        ("metadata.csv", "train"),
        wilds.iwildcam,
        "split=from_list split.target=unseen_cameras trainer.batch_size=1",
        model="resnet50",
    ),
    "fmow": Listed(
        (_codalab("0xaec91eb7c9d548ebb15e1b5e60f966ab", "fmow_v1.1", 53_893_324_800),),
        ("rgb_metadata.csv", "country_code_mapping.csv", "images"),
        wilds.fmow,
        "split=from_list 'split.target=[later_Africa,later_Americas,later_Asia,later_Europe,later_Oceania]'",
        model="resnet50",
    ),
    "office31": Images(
        (
            _tsinghua(amazon="ec12dfcddade43ab8101", dslr="a41d818ae2f34da7bb32", webcam="8a41009a166e4131adcd"),
            # That of github.com/KevinMusgrave/pytorch-adapt.
            Source(
                "cornell",
                (Item("https://cornell.box.com/shared/static/3v2ftdkdhpz1lbbr4uhu0135w7m79p7q", "office31.tar.gz"),),
            ),
        ),
        _domains("amazon", "dslr", "webcam"),
        archives=("domain_adaptation_images*",),
        model="resnet50",
    ),
    "digits_dg": Listed(
        (_drive("15V7EsHfCcfbKgsDmzQKj_DfXt_XYp_P7", "digits_dg.zip", "dassl"),),
        tuple(f"{domain}/{split}" for domain in dassl.DIGITS for split in ("train", "val")),
        dassl.digits_dg,
        "split=from_list split.target=svhn",
    ),
    "sviro": Images(
        (Source("dfki", (Item("https://sviro.kl.dfki.de/?wpdmdl=1731", f"{SVIRO}.zip"),)),),
        _domains("aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5", "zoe"),
        model="resnet50",
    ),
    **{f"spawrious_{name}": _spawrious(name) for name in spawrious.CHALLENGES},
    "nico": Images(
        # That of the conduit package, in the Dropbox folder of github.com/xxgege/NICO-plus.
        (Source("dropbox", (Item(f"{DROPBOX}/sh/{NICO}/track_1/track_1.zip?dl=1", "track_1.zip"),)),),
        _domains("autumn", "dim", "grass", "outdoor", "rock", "water"),
        archives=("NICO_DG*",),
        model="resnet50",
    ),
    "mini_domainnet": Listed(
        (
            Source(
                "dassl",
                (
                    Item(f"{DRIVE}15rrLDCrzyi6ZY-1vJar3u7plgLe4COL7", "splits_mini.zip"),
                    *(Item(f"{VISDA}{path}.zip", f"{path.rpartition('/')[2]}.zip") for path in MINI_DOMAINNET),
                ),
                drive_or_http,
            ),
        ),
        (*(f"splits_mini/{name}.txt" for name in dassl.SPLITS), *dassl.MINI_DOMAINS),
        dassl.mini_domainnet,
        "split=from_list split.target=sketch",
    ),
    "rotated_mnist": Mnist("convnet"),
    "colored_mnist": Mnist("convnet_2ch"),
}
