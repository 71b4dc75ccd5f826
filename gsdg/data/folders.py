"""Image folders `<root>/<domain>/<class>/<file>`: PACS, VLCS, OfficeHome, TerraIncognita, DomainNet, or your own.

Images are in DomainBed's order, because the splits index it: classes are sorted, and the files of a class come in the
order in which torchvision's ImageFolder walks them. Deviations from DomainBed: domains are named in the config; hidden
files and folders are skipped (see `walk`); classes that differ between domains are an error unless
`dataset.classes=union`, where DomainBed would silently give such domains shifted labels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from gsdg.config.names import Scalar, as_typed
from gsdg.data.cache.memory_map import Cache
from gsdg.data.dataset import Domain, DomainDataset, check_domain_names
from gsdg.data.image_io import EXTENSIONS, read_image
from gsdg.data.published_counts import prepare_hint
from gsdg.data.walk import Contents, contents_of, folders_in, loop_at
from gsdg.utils.errors import UserError, check_literal, listing, plural
from gsdg.utils.text import printable

log = logging.getLogger(__name__)
Augment = Literal["photos", "none"]
Classes = Literal["same", "union"]
EACH_CLASS = (
    f"Each class of each domain needs at least one image ({listing(EXTENSIONS)}): "
    "add one, or remove the class from all domains."
)
NO_CONTENTS = Contents([], [], [])


class ImageFolders:
    """A dataset of image folders on disk.

    The constructor lists at most the root folder; `read` lists every image. Both raise UserError if the folders are not
    laid out as `<root>/<domain>/<class>/<file>`.

    Args:
        name: name of the dataset.
        root: its folder, absolute or relative to `data_dir`.
        domains: names of the domain folders; None for every folder in `root`.
        augment: "photos" for DomainBed's augmentation of the source domains; "none", for example for digits or text.
        classes: "same": every domain must have every class; "union": a domain may lack classes that another one has.
        cache: where decoded images are kept for `trainer.transform=batched`: "auto" (next to the dataset, or in the
            home directory), "off", or a folder. The exact transform decodes an image whenever it is drawn.
        short_side: larger images are resized before they are stored in the cache, so that their shorter side has this
            many pixels; >= 1.
        data_dir: the folder of all datasets.
    """

    channels = 3

    def __init__(
        self,
        *,
        name: str,
        root: str,
        domains: Sequence[Scalar] | None,
        augment: Augment,
        classes: Classes = "same",
        cache: str = "auto",
        short_side: int = 256,
        data_dir: str,
    ) -> None:
        check_literal("dataset.augment", augment, Augment)
        check_literal("dataset.classes", classes, Classes)
        self.name = name
        self.augment = augment
        self.data_dir = Path(data_dir).expanduser().absolute()
        self.root = self.data_dir / Path(root).expanduser()  # an absolute root replaces data_dir
        self.classes = classes
        self.domains = self._domain_folders() if domains is None else self._names_as_text(domains)
        self.cache = Cache(cache, beside=self.root, short_side=short_side)
        check_domain_names(self.domains)
        if undecodable := [name for name in self.domains if printable(name) != name]:
            raise UserError(
                f"{name}: the names of the folders {listing(undecodable)} in {self.root} are not UTF-8. "
                "Domains are named in configs, records and tables: rename these folders."
            )

    def read(self) -> DomainDataset:
        """List every image, in DomainBed's order.

        UserError: a folder is missing, classes differ between domains, or a class has no images.
        """
        self.check_present()
        class_folders = self._class_folders()
        classes = self._all_classes(class_folders)
        files = {name: self._files(name, class_folders[name], classes) for name in self.domains}
        if absent := [label for label in classes if not any(by_class[label] for by_class in files.values())]:
            raise UserError(f"{self.name}: no domain of {self.root} has images of {listing(absent)}. {EACH_CLASS}")
        return DomainDataset(self.name, classes, {name: _domain(name, by_class) for name, by_class in files.items()})

    def check_present(self) -> None:
        """UserError if the folder of a domain is missing; does not look for images."""
        existing = self._domain_folders()
        if missing := [name for name in self.domains if name not in existing]:
            raise UserError(
                f"{self.name}: no folder for domain {listing(missing)} in {self.root}. "
                f"Found: {listing(existing)}. Complete the data set, or name its domains in dataset.domains."
            )

    def _names_as_text(self, domains: Sequence[Scalar]) -> list[str]:
        """The names of `domains` as text. Lists the root only if Hydra has read a name as a number."""
        names = [name for name in domains if isinstance(name, str)]
        return names if len(names) == len(domains) else as_typed(domains, self._domain_folders(), "dataset.domains")

    def _domain_folders(self) -> list[str]:
        """The names of the folders in the root. UserError: the root is missing or has no folders."""
        if not self.root.is_dir():
            raise UserError(self._root_missing_message())
        if not (names := folders_in(self.root)):
            raise UserError(f"{self.name}: no domain folders in {self.root}. Layout: <domain>/<class>/<image>.")
        return names

    def _root_missing_message(self) -> str:
        hint = prepare_hint(self.name, self.root, self.data_dir)
        if self.root.is_relative_to(self.data_dir) and not self.data_dir.is_dir():
            return (
                f"{self.name}: data_dir={self.data_dir} is not a folder. Set data_dir=... to the folder that holds "
                f"{self.root.relative_to(self.data_dir)}{hint}."
            )
        siblings = folders_in(self.root.parent) if self.root.parent.is_dir() else []
        return (
            f"{self.name}: {self.root} is not a folder. {self.root.parent} holds: {listing(siblings)}. "
            "Set data_dir=... to the folder that holds it, or dataset.root=... to its own name or path"
            f"{hint}."
        )

    def _class_folders(self) -> dict[str, list[str]]:
        """{domain: its class folders}. UserError: there are none at all, or one is a link to a folder above it."""
        class_folders = {name: folders_in(self.root / name) for name in self.domains}
        folders = [Path(name, label) for name, labels in class_folders.items() for label in ("", *labels)]
        if loops := [loop for folder in folders if (loop := loop_at(self.root / folder))]:
            raise UserError("\n".join(loops))
        if not any(class_folders.values()):
            raise UserError(f"{self.name}: no images in {self.root}. Layout: <domain>/<class>/<image>.")
        return class_folders

    def _all_classes(self, class_folders: dict[str, list[str]]) -> list[str]:
        """The class names of all domains, sorted. UserError: a domain lacks some of them and `classes` is "same"."""
        union = sorted({label for labels in class_folders.values() for label in labels})
        lacks = {name: [label for label in union if label not in labels] for name, labels in class_folders.items()}
        if self.classes == "same" and any(lacks.values()):
            details = "; ".join(f"{name} lacks {listing(absent)}" for name, absent in lacks.items() if absent)
            raise UserError(
                f"{self.name}: classes differ between domains of {self.root}: {details}. "
                "Every domain needs the same class folders: rename or complete them. "
                "If a domain really has no images of a class: dataset.classes=union."
            )
        return union

    def _files(self, domain: str, labels: list[str], classes: list[str]) -> dict[str, list[str]]:
        """{class: paths of its images} of one domain, in the order of `classes`.

        Args:
            domain: name of the domain.
            labels: its class folders.
            classes: the classes of all domains.

        Raises:
            UserError: a class without images, if self.classes is "same"; a link to a folder above it.
        """
        folder = self.root / domain
        by_class = {label: contents_of(folder / label) if label in labels else NO_CONTENTS for label in classes}
        if loops := [loop for contents in by_class.values() for loop in contents.loops]:
            raise UserError("\n".join(loops))
        if hidden := [path for contents in by_class.values() for path in contents.hidden]:
            log.warning("%s: %s left out, such as %s", domain, plural(len(hidden), "hidden image"), hidden[0])
        empty = [folder / label for label, contents in by_class.items() if not contents.images]
        if empty and self.classes == "same":
            raise UserError(f"no images in {listing(empty)}. {EACH_CLASS}")
        return {label: contents.images for label, contents in by_class.items()}


def _domain(name: str, by_class: dict[str, list[str]]) -> Domain:
    """A domain whose images are read from files; by_class: {class: paths}, in the order of the class indices."""
    paths = [path for class_paths in by_class.values() for path in class_paths]
    labels = np.repeat(
        np.arange(len(by_class), dtype=np.int64), [len(class_paths) for class_paths in by_class.values()]
    )
    return Domain(name, labels, partial(_load, paths), paths)


def _load(paths: list[str], index: int) -> Image.Image:
    return read_image(paths[index])
