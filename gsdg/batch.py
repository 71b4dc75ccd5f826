"""The two small things that data, models and algorithms agree on: what a minibatch is, and what a model is fed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ImageSpec(NamedTuple):
    """What a model wants: square images of `size` pixels, `channels` of them, normalised by mean and std."""

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Batch(NamedTuple):
    """One domain's minibatch: images [B, C, H, W] float32, labels [B] int64, and the domain's name."""

    images: Tensor
    labels: Tensor
    domain: str

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Batch:
        images = self.images.to(device, non_blocking=True, memory_format=memory_format)
        return Batch(images, self.labels.to(device, non_blocking=True), self.domain)
