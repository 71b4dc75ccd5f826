"""From a PIL image to what a model is fed: DomainBed's transforms, exactly, at the size the model asks for.

They are torchvision's (v1) on PIL images and draw from torch's CPU generator only: `gsdg.seeding.cpu_seed` fixes them.
Deviation: size, channels, mean and std come from the model's ImageSpec instead of 224, 3 and ImageNet's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from gsdg.batch import ImageSpec

Transform = Callable[[Image.Image], Tensor]  # PIL image -> [C, S, S] float32
MODES = {1: "L", 3: "RGB"}


def train_transform(spec: ImageSpec, augment: str) -> Transform:
    """`photos`: DomainBed's random crop, flip, colour jitter and grey. `none`: the evaluation transform."""
    if augment == "none":
        return eval_transform(spec)
    assert augment == "photos", augment
    return T.Compose(
        [
            _to_mode(spec),
            T.RandomResizedCrop(spec.size, scale=(0.7, 1.0)),
            T.RandomHorizontalFlip(),
            T.ColorJitter(0.3, 0.3, 0.3, 0.3),
            T.RandomGrayscale(),  # p = 0.1
            T.ToTensor(),
            T.Normalize(spec.mean, spec.std),
        ]
    )


def eval_transform(spec: ImageSpec) -> Transform:
    """Resize to a square whatever the aspect (PIL copies an image that already fits), scale to [0, 1], normalise."""
    resize = T.Resize((spec.size, spec.size))
    return T.Compose([_to_mode(spec), resize, T.ToTensor(), T.Normalize(spec.mean, spec.std)])


def _to_mode(spec: ImageSpec) -> Callable[[Image.Image], Image.Image]:
    assert len(spec.mean) == len(spec.std) == spec.channels, spec
    return partial(_convert, MODES[spec.channels])  # a partial and not a lambda: workers may have to pickle it


def _convert(mode: str, image: Image.Image) -> Image.Image:
    return image.convert(mode)
