"""The two words of the data side: a Domain, and the DomainDataset that holds them in order. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True, eq=False)
class Domain:
    """Labelled images of one origin: labels [N] int64, and load(i) -> the i-th image, 0 <= i < N.

    An image is Pillow's, or once it has been through `gsdg.data.cache` an array [h, w, 3] uint8. `files[i]` is where
    it comes from; None where the images are in memory.
    """

    name: str
    labels: np.ndarray
    load: Callable[[int], Image.Image | np.ndarray]
    files: Sequence[str] | None = None

    def __post_init__(self) -> None:
        assert self.labels.ndim == 1, self.labels.shape
        assert self.labels.dtype == np.int64, self.labels.dtype

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class DomainDataset:
    """Domains of one label set; label y means classes[y]. Their order is the data set's own: splits hash its index."""

    name: str
    classes: list[str]
    domains: dict[str, Domain]

    def __post_init__(self) -> None:
        for name, domain in self.domains.items():
            assert name == domain.name, (name, domain.name)
            assert not len(domain) or 0 <= domain.labels.min() <= domain.labels.max() < len(self.classes), name
