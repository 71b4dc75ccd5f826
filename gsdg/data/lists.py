"""Images that a list names: a CSV or Parquet file with the columns path, label, domain and, if you like, split, group.

The images of a domain are in the order of the rows. Domains and classes are sorted by name, so a list that has the rows
of an image folder in its order gives the same splits. The list is read in columns: a million rows keep 150 to 200 MB
(benchmarks/lists.py).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from gsdg.config.names import Scalar, as_typed
from gsdg.data.cache.memory_map import Cache
from gsdg.data.dataset import Domain, DomainDataset, check_domain_names
from gsdg.data.folders import Augment
from gsdg.data.image_io import read_image
from gsdg.data.list_table import PARTS, Column, ListTable, checked_columns, domains_of, read_table
from gsdg.data.published_counts import prepare_hint
from gsdg.utils.errors import UserError, check_literal, listing, plural

log = logging.getLogger(__name__)
ListClasses = Literal["strict", "union", "intersection"]
LOOKED_AT = 3  # images per domain that must exist when a run begins


class ImageList:
    """A dataset of the images that a list names.

    The constructor reads the list's column of domains if `domains` is None; `read` reads the list. Both raise UserError
    for a list that cannot be used.

    Args:
        name: name of the dataset.
        file: the list, absolute or relative to `data_dir`. Paths in it are absolute or relative to its folder.
        domains: names of the domains to use, in this order; None for every domain of the list, sorted.
        augment: "photos" for DomainBed's augmentation of the source domains; "none", for example for digits or text.
        classes: "strict": every domain must have every class; "union": a domain may lack classes that another one has;
            "intersection": only the classes that every domain has, and the rows of other classes are left out.
        class_names: the labels in the order of the class indices; None: sorted, whole numbers by their value.
        cache: where decoded images are kept for `trainer.transform=batched`: "auto" (beside the list, or in the home
            directory), "off", or a folder.
        short_side: larger images are resized before they are stored in the cache, so that their shorter side has this
            many pixels; >= 1.
        data_dir: the folder of all datasets.
    """

    channels = 3

    def __init__(
        self,
        *,
        name: str,
        file: str,
        domains: Sequence[Scalar] | None,
        augment: Augment,
        classes: ListClasses = "strict",
        class_names: Sequence[Scalar] | None = None,
        cache: str = "auto",
        short_side: int = 256,
        data_dir: str,
    ) -> None:
        check_literal("dataset.augment", augment, Augment)
        check_literal("dataset.classes", classes, ListClasses)
        self.name = name
        self.augment = augment
        self.data_dir = Path(data_dir).expanduser().absolute()
        self.file = Path(os.path.normpath(self.data_dir / Path(file).expanduser()))
        self.classes = classes
        self.class_names = class_names
        self.domains = self._all_domains() if domains is None else self._names_as_text(domains)
        self.cache = Cache(cache, beside=self.file, short_side=short_side)
        check_domain_names(self.domains)

    @property
    def root(self) -> Path:
        """The folder of the list."""
        return self.file.parent

    @property
    def has_official_split(self) -> bool:
        """Whether the list has a column split; True if there is no such file here, so that the run finds out."""
        return not self.file.is_file() or "split" in checked_columns(self.file)

    def read(self) -> DomainDataset:
        """Read the list.

        UserError: it cannot be used, it lacks a domain, its classes differ between domains, or images are missing.
        """
        self.check_present()
        table = read_table(self.file)
        rows = rows_of_domains(table, self.domains, self.file)
        classes = self.class_order(table, rows)
        used = rows_of_classes(table, rows, classes)
        domains = {name: _domain(name, table, used[name], _class_indices(table, classes)) for name in self.domains}
        if left_out := sum(map(len, rows.values())) - sum(map(len, used.values())):
            log.warning("%s: %s of classes that not every domain has left out", self.name, plural(left_out, "row"))
        self._check_first_files(domains)
        return DomainDataset(self.name, classes, domains)

    def check_present(self) -> None:
        """UserError if the list is missing; does not look for images."""
        if not self.file.is_file():
            here = Path(os.path.relpath(self.file, self.data_dir)).absolute()
            found = f" There is one in the working directory: dataset.file={here}" if here.is_file() else ""
            raise UserError(
                f"{self.name}: the list {self.file} does not exist. dataset.file is absolute, or relative to "
                f"data_dir={self.data_dir}{prepare_hint(self.name, self.root, self.data_dir)}.{found}"
            )

    def class_order(self, table: ListTable, rows: dict[str, np.ndarray]) -> list[str]:
        """The class names in the order of their indices.

        Args:
            table: the list.
            rows: {domain: its rows}.

        Raises:
            UserError: classes differ between domains, or class_names are not those of the list.
        """
        present = {name: set(labels_of(table.label, of_domain)) for name, of_domain in rows.items()}
        union, shared = set().union(*present.values()), set.intersection(*present.values())
        if self.classes == "strict" and union != shared:
            raise UserError(
                f"{self.name}: classes differ between domains of {self.file}: {differences(present)}.\nComplete the "
                "list, or choose: dataset.classes=union (a domain may lack classes) or dataset.classes=intersection "
                "(only the classes that every domain has)."
            )
        classes = in_order(shared if self.classes == "intersection" else union)
        if not classes:
            raise UserError(f"dataset.classes=intersection: no class is in every domain of {self.file}.")
        return classes if self.class_names is None else self._as_given(classes)

    def _as_given(self, classes: list[str]) -> list[str]:
        """class_names as text. UserError: they are not the same names as `classes`."""
        names = as_typed(self.class_names or [], classes, "dataset.class_names")
        if sorted(names) != sorted(classes):
            unknown, missing = [n for n in names if n not in classes], [c for c in classes if c not in names]
            raise UserError(
                f"dataset.class_names must name each label of {self.file} once. No such label: {listing(unknown)}; "
                f"not named: {listing(missing)}; twice: {listing(sorted({n for n in names if names.count(n) > 1}))}."
            )
        return names

    def _all_domains(self) -> list[str]:
        self.check_present()
        return domains_of(self.file)

    def _names_as_text(self, domains: Sequence[Scalar]) -> list[str]:
        """The names of `domains` as text. Reads the list only if Hydra has read a name as a number."""
        names = [name for name in domains if isinstance(name, str)]
        return names if len(names) == len(domains) else as_typed(domains, self._all_domains(), "dataset.domains")

    def _check_first_files(self, domains: dict[str, Domain]) -> None:
        """UserError if one of the first images of a domain does not exist. A look at all of them takes too long."""
        first = [path for domain in domains.values() for path in domain.paths[:LOOKED_AT]]
        if missing := [path for path in first if not os.path.isfile(path)]:
            raise UserError(
                f"{self.name}: no such image: {listing(missing[:LOOKED_AT])}. Paths in the list are absolute, or "
                f"relative to its folder {self.root}.\nTo check all of them: python -m gsdg.data verify {self.name} "
                f"dataset.file={self.file}"
            )


def rows_of_domains(table: ListTable, domains: Sequence[str], file: Path) -> dict[str, np.ndarray]:
    """{domain: its rows in the table, int64}, in the order of `domains`. UserError: the list lacks one."""
    numbers = {name: code for code, name in enumerate(table.domain.values)}
    if missing := [name for name in domains if name not in numbers]:
        raise UserError(f"dataset.domains: {file} has no domain {listing(missing)}. Valid: {listing(sorted(numbers))}.")
    return {name: np.flatnonzero(table.domain.codes == numbers[name]) for name in domains}


def rows_of_classes(table: ListTable, rows: dict[str, np.ndarray], classes: list[str]) -> dict[str, np.ndarray]:
    """{domain: those of its rows that have one of the classes}."""
    used = _class_indices(table, classes) >= 0
    return {name: of_domain[used[table.label.codes[of_domain]]] for name, of_domain in rows.items()}


def _class_indices(table: ListTable, classes: list[str]) -> np.ndarray:
    """[codes of labels] int64: the class index of each; -1 if it is none of the classes."""
    index = {label: number for number, label in enumerate(classes)}
    return np.array([index.get(label, -1) for label in table.label.values], np.int64)


def labels_of(column: Column, rows: np.ndarray) -> list[str]:
    """The different values in these rows."""
    return [column.values[code] for code in np.unique(column.codes[rows])]


def in_order(labels: Iterable[str]) -> list[str]:
    """The labels sorted by name, or by value if all are whole numbers."""
    labels = list(labels)
    numeric = all(re.fullmatch(r"-?[0-9]+", label) for label in labels)
    return sorted(labels, key=lambda label: (int(label), label)) if numeric else sorted(labels)


def differences(present: dict[str, set[str]]) -> str:
    """`photo lacks cat; sketch lacks dog, horse`. present: {domain: its classes}."""
    union = set().union(*present.values())
    lacking = {name: in_order(union - classes) for name, classes in present.items() if union - classes}
    return "; ".join(f"{name} lacks {listing(classes)}" for name, classes in lacking.items())


def _domain(name: str, table: ListTable, rows: np.ndarray, class_of_code: np.ndarray) -> Domain:
    """The images of these rows. class_of_code: see `_class_indices`."""
    paths, labels = table.paths.take(rows), class_of_code[table.label.codes[rows]]
    return Domain(name, labels, partial(_load, paths), paths, official=_official(table.split, rows))


def _official(split: Column | None, rows: np.ndarray) -> dict[str, np.ndarray] | None:
    """{part: positions in `rows`}; None if the list has no column split."""
    if split is None:
        return None
    words = np.array(split.values, object)[split.codes[rows]]
    return {part: np.flatnonzero(words == part) for part in PARTS}


def _load(paths: Sequence[str], index: int) -> Image.Image:
    return read_image(paths[index])
