"""The types that data, models and algorithms share: a minibatch of one domain, and the images that a model expects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNLABELLED = -1  # the label of an image whose label must not be used; `ignore_index` of torch's losses


class ImageSpec(NamedTuple):
    """The images that a model expects.

    size: height and width in pixels.
    channels: 1: grey; 2: red and green only (ColoredMNIST); 3: RGB.
    mean, std: per channel, for images in [0, 1]; the transform normalizes with them.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Batch(NamedTuple):
    """A minibatch of one domain.

    images: [B, C, H, W] float32 on the device; before that, whatever the host half of the transform returns.
    labels: [B] int64; all UNLABELLED in a minibatch of a target domain.
    domain: its name.
    """

    images: Any
    labels: Tensor
    domain: str

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; the copy is asynchronous where the memory is pinned."""
        images = self.images.to(device, non_blocking=True)
        return Batch(images, self.labels.to(device, non_blocking=True), self.domain)


class Joint(NamedTuple):
    """The minibatches of D domains concatenated in domain order, as DomainBed feeds them to its networks; N images."""

    images: Tensor  # [N, C, H, W]
    labels: Tensor  # [N]
    sizes: tuple[int, ...]  # number of images per domain

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """rows [N, ...] -> one tensor per domain."""
        return rows.split(self.sizes)

    def repeated(self, numbers: Iterable[int]) -> Tensor:
        """[N] int64: for each image the number that is given for its domain, for losses that classify domains."""
        device = self.labels.device
        pairs = zip(numbers, self.sizes, strict=True)
        return torch.cat([torch.full((size,), number, device=device) for number, size in pairs])


def join(batches: Sequence[Batch]) -> Joint:
    """Concatenate the minibatches of several domains."""
    images, labels = torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])
    return Joint(images, labels, tuple(len(batch.labels) for batch in batches))
