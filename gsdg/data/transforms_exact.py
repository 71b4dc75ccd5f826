"""From a PIL image to what a model is fed: DomainBed's transforms, exactly, at the size the model asks for.

They are torchvision's (v1) on PIL images and draw from torch's CPU generator only: `gsdg.seeding.cpu_seed` fixes them.
Deviation: size, channels, mean and std come from the model's ImageSpec instead of 224, 3 and ImageNet's.

A transform of either mode (`Exact` here, `Batched` in `batched`) has two halves: `prepare(images)` draws and works on
the host, inside a worker if need be; `finish` completes the batch on the device that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from gsdg.batch import ImageSpec

CROP_SCALE, CROP_RATIO = (0.7, 1.0), (3 / 4, 4 / 3)  # share of the area, width / height
JITTER = (0.3, 0.3, 0.3, 0.3)  # brightness, contrast, saturation, hue
GREY_PROBABILITY = 0.1
MODES = {1: "L", 2: "RGB", 3: "RGB"}  # of two channels, the third goes after ToTensor


class Transform(Protocol):
    """Images as a Domain loads them -> [B, C, S, S] float32, in two halves."""

    def prepare(self, images: Sequence) -> Any: ...  # on the host; tensors, in whatever tuples

    def finish(self, prepared: Any) -> Tensor: ...  # on the device


class Exact:
    """Image by image, by torchvision on Pillow's images, all of it on the host: DomainBed's own pixels.

    augment: `photos` is DomainBed's random crop, flip, colour jitter and grey; `none` its evaluation.
    """

    def __init__(self, spec: ImageSpec, augment: str) -> None:
        assert augment in ("photos", "none"), augment
        self.transform = train_transform(spec) if augment == "photos" else eval_transform(spec)

    def prepare(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([self.transform(image) for image in images])

    def finish(self, prepared: Tensor) -> Tensor:
        return prepared


def train_transform(spec: ImageSpec) -> Callable[[Image.Image], Tensor]:
    return T.Compose(
        [
            _to_mode(spec),
            T.RandomResizedCrop(spec.size, CROP_SCALE, CROP_RATIO),
            T.RandomHorizontalFlip(),
            T.ColorJitter(*JITTER),
            T.RandomGrayscale(GREY_PROBABILITY),
            T.ToTensor(),
            partial(_keep, spec.channels),
            T.Normalize(spec.mean, spec.std),
        ]
    )


def eval_transform(spec: ImageSpec) -> Callable[[Image.Image], Tensor]:
    """Resize to a square whatever the aspect (PIL copies an image that already fits), scale to [0, 1], normalise."""
    resize = T.Resize((spec.size, spec.size))
    keep = partial(_keep, spec.channels)
    return T.Compose([_to_mode(spec), resize, T.ToTensor(), keep, T.Normalize(spec.mean, spec.std)])


def _to_mode(spec: ImageSpec) -> Callable[[Image.Image], Image.Image]:
    assert len(spec.mean) == len(spec.std) == spec.channels, spec
    return partial(_convert, MODES[spec.channels])  # a partial and not a lambda: workers may have to pickle it


def _convert(mode: str, image: Image.Image) -> Image.Image:
    return image.convert(mode)


def _keep(channels: int, image: Tensor) -> Tensor:
    """[3, H, W] -> [channels, H, W]: of two channels, red and green. As it is where the mode has no more."""
    return image[:channels]
