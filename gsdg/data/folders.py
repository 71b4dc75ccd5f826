"""Any `<root>/<domain>/<class>/<file>` tree: PACS, VLCS, OfficeHome, TerraIncognita, DomainNet, or your own.

Order is DomainBed's, because splits index it: sorted classes, and below a class the files as torchvision's ImageFolder
walks them. Deviations: domains come from the config, by name; hidden folders (`.ipynb_checkpoints`) are no domain and
no class; classes that differ between domains are an error, where DomainBed would shift their labels in silence.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from gsdg.data.cache import Cache
from gsdg.data.domains import Domain, DomainDataset
from gsdg.data.images import EXTENSIONS, read_image
from gsdg.data.published import PUBLISHED
from gsdg.errors import UserError, check_literal, listing

Augment = Literal["photos", "none"]


class ImageFolders:
    """A data set on disk. `root` is relative to `data_dir`, or absolute; `domains=None` means every folder of the root.

    cache: where decoded images are kept for `trainer.transform=batched`: `auto`, `off` or a folder; short_side: the
    bound on the shorter side at which they are kept, in pixels. The exact transform decodes at every draw.

    Building one lists at most the root; `read` lists every image. Both raise UserError for what is not as it should be.
    """

    channels = 3

    def __init__(
        self,
        *,
        name: str,
        root: str,
        domains: Sequence[str] | None,
        augment: Augment,
        cache: str = "auto",
        short_side: int = 256,
        data_dir: str,
    ) -> None:
        check_literal("dataset.augment", augment, Augment)
        self.name = name
        self.augment = augment
        self.data_dir = Path(data_dir).expanduser().absolute()
        self.root = self.data_dir / Path(root).expanduser()  # an absolute root wins over data_dir
        self.domains = self._found() if domains is None else list(domains)
        self.cache = Cache(cache, beside=self.root, short_side=short_side)
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise UserError(f"dataset.domains={self.domains}: name at least one domain, each once.")

    def read(self) -> DomainDataset:
        """List every image, sorted. UserError: a missing folder, classes that differ, a class without images."""
        self.check_present()
        classes = self._classes()
        domains = {name: _read_domain(self.root / name, classes) for name in self.domains}
        return DomainDataset(self.name, classes, domains)

    def check_present(self) -> None:
        """UserError unless there is a folder for every domain; no image is looked for."""
        found = self._found()
        if missing := [name for name in self.domains if name not in found]:
            raise UserError(
                f"{self.name}: no folder for domain {listing(missing)} in {self.root}. "
                f"Found: {listing(found)}. Complete the data set, or name its domains in dataset.domains."
            )

    def _found(self) -> list[str]:
        """The folders of the root, which must be there and hold some."""
        if not self.root.is_dir():
            raise UserError(self._missing())
        if not (names := folders_in(self.root)):
            raise UserError(f"{self.name}: no domain folders in {self.root}. Layout: <domain>/<class>/<image>.")
        return names

    def _missing(self) -> str:
        if self.root.is_relative_to(self.data_dir) and not self.data_dir.is_dir():
            return (
                f"{self.name}: data_dir={self.data_dir} is not a folder. "
                f"Set data_dir=... to the folder that holds {self.root.relative_to(self.data_dir)}{self._or_get_it()}."
            )
        beside = folders_in(self.root.parent) if self.root.parent.is_dir() else []
        return (
            f"{self.name}: {self.root} is not a folder. {self.root.parent} holds: {listing(beside)}. "
            "Set data_dir=... to the folder that holds it, or dataset.root=... to its own name or path"
            f"{self._or_get_it()}."
        )

    def _or_get_it(self) -> str:
        if self.name not in PUBLISHED or not self.root.is_relative_to(self.data_dir):
            return ""
        return f", or get it: python -m gsdg.data prepare {self.name} {shlex.quote(f'data_dir={self.data_dir}')}"

    def _classes(self) -> list[str]:
        """The class names that all domains share, sorted."""
        own = {name: folders_in(self.root / name) for name in self.domains}
        union = sorted({label for labels in own.values() for label in labels})
        if not union:
            raise UserError(f"{self.name}: no images in {self.root}. Layout: <domain>/<class>/<image>.")
        lacks = {name: [label for label in union if label not in labels] for name, labels in own.items()}
        if any(lacks.values()):
            details = "; ".join(f"{name} lacks {listing(labels)}" for name, labels in lacks.items() if labels)
            raise UserError(
                f"{self.name}: classes differ between domains of {self.root}: {details}. "
                "Every domain needs the same class folders: rename or complete them."
            )
        return union


def _read_domain(folder: Path, classes: list[str]) -> Domain:
    files = [images_in(folder / label) for label in classes]
    if empty := [label for label, paths in zip(classes, files, strict=True) if not paths]:
        raise UserError(
            f"no images in {listing(folder / label for label in empty)}. Each class of each domain needs at least one "
            f"({listing(EXTENSIONS)}): add it, or remove the class from all domains."
        )
    paths = [path for group in files for path in group]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(group) for group in files])
    return Domain(folder.name, labels, partial(_load, paths), paths)


def _load(paths: list[str], index: int) -> Image.Image:
    return read_image(paths[index])


def folders_in(parent: Path) -> list[str]:
    with os.scandir(parent) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def images_in(folder: Path) -> list[str]:
    """Every image below a class folder: folders in order of their path, files in order of their name."""
    return [
        os.path.join(parent, name)
        for parent, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(EXTENSIONS)
    ]
