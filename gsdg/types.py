"""The small things that data, models and algorithms agree on: what a minibatch is, and what a model is fed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ImageSpec(NamedTuple):
    """What a model wants: square images of `size` pixels, normalised by mean and std, a number a channel.

    channels: 1 is grey, 2 the red and the green of a colour image (ColoredMNIST), 3 all of it.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Batch(NamedTuple):
    """One domain's minibatch: images, labels [B] int64, and the domain's name.

    A model gets images [B, C, H, W] float32; on their way to the device they are what the transform prepared.
    """

    images: Any
    labels: Tensor
    domain: str

    def to(self, device: torch.device) -> Batch:
        images = self.images.to(device, non_blocking=True)
        return Batch(images, self.labels.to(device, non_blocking=True), self.domain)


class Joint(NamedTuple):
    """The minibatches of D domains as one, in domain order, as DomainBed's networks get them; N images in all."""

    images: Tensor  # [N, C, H, W]
    labels: Tensor  # [N]
    sizes: tuple[int, ...]  # images of each domain

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """rows [N, ...] -> each domain's own."""
        return rows.split(self.sizes)

    @property
    def domains(self) -> Tensor:
        """[N] int64: which of the D domains an image is of, for losses that classify or compare domains."""
        device = self.labels.device
        return torch.cat([torch.full((size,), d, device=device) for d, size in enumerate(self.sizes)])


def join(batches: Sequence[Batch]) -> Joint:
    images, labels = torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])
    return Joint(images, labels, tuple(len(batch.labels) for batch in batches))
