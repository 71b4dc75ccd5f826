"""The two core dataset types: Domain, and DomainDataset, an ordered collection of domains. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from gsdg.utils.errors import UserError


@dataclass(frozen=True, eq=False)
class Domain:
    """The labelled images of one domain.

    Args:
        name: name of the domain.
        labels: [N] int64, the class index of each image.
        load: load(i) returns the i-th image, 0 <= i < N: a Pillow image, or an array [h, w, 3] uint8 once the domain
            has been opened through `gsdg.data.cache.memory_map`.
        load_many: load_many(indices) returns several images at once, [n, h, w] or [n, h, w, 3] uint8, the pixels of
            `load`; None where images are read one by one.
        files: files[i] is the path of the file that the i-th image is from; None if there are no files.
        official: {"in", "out", "test": image indices}: the parts that the data set itself defines; None if it does not.
    """

    name: str
    labels: np.ndarray
    load: Callable[[int], Image.Image | np.ndarray]
    files: Sequence[str] | None = None
    load_many: Callable[[np.ndarray], np.ndarray] | None = None
    official: Mapping[str, np.ndarray] | None = None

    def __post_init__(self) -> None:
        assert self.labels.ndim == 1, self.labels.shape
        assert self.labels.dtype == np.int64, self.labels.dtype

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: np.ndarray) -> Sequence[Image.Image | np.ndarray] | np.ndarray:
        """The images of these indices: one array if `load_many` gives it, else a list."""
        return self.load_many(indices) if self.load_many else [self.load(int(i)) for i in indices]

    @property
    def paths(self) -> Sequence[str]:
        """`files` of a domain whose images are files."""
        assert self.files is not None, self.name
        return self.files


def check_domain_names(domains: Sequence[str]) -> None:
    """UserError unless dataset.domains has one name or more, each once."""
    if not domains or len(set(domains)) < len(domains):
        raise UserError(f"dataset.domains={list(domains)}: name at least one domain, each once.")


@dataclass(frozen=True, eq=False)
class DomainDataset:
    """The domains of a dataset, which share one set of classes.

    Args:
        name: name of the dataset.
        classes: class names; label y means classes[y].
        domains: {name: domain}. The order is fixed by the dataset, because the split of a domain is seeded by the
            domain's index.
    """

    name: str
    classes: list[str]
    domains: dict[str, Domain]

    def __post_init__(self) -> None:
        for name, domain in self.domains.items():
            assert name == domain.name, (name, domain.name)
            assert not len(domain) or 0 <= domain.labels.min() <= domain.labels.max() < len(self.classes), name
