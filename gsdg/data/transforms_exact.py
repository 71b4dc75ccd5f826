"""DomainBed's image transforms, exactly: from a Pillow image to the tensor that a model gets.

They are torchvision's v1 transforms on Pillow images and draw only from torch's CPU generator, so that
`cpu_seed` makes them reproducible. Deviation from DomainBed: image size, channels, mean and std come from
the model's ImageSpec instead of being fixed to 224, 3 and ImageNet's statistics.

`Exact` here and `Batched` in `transforms_batched` are the two classes of `gsdg.data.Transform`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from gsdg.types import ImageSpec

CROP_SCALE, CROP_RATIO = (0.7, 1.0), (3 / 4, 4 / 3)  # fraction of the image's area; width / height
JITTER = (0.3, 0.3, 0.3, 0.3)  # brightness, contrast, saturation, hue
GREY_PROBABILITY = 0.1
# Pillow's mode by number of channels. A model with 2 channels gets an RGB image without its third channel.
MODES = {1: "L", 2: "RGB", 3: "RGB"}


class Exact:
    """DomainBed's transform, image by image, with torchvision on Pillow images.

    The host makes uint8 pixels, which are smaller to send; the device converts them to the same float32 values, bit
    for bit, as torchvision's ToTensor and Normalize.

    Args:
        spec: the size, channels, mean and std that the model expects.
        augment: "photos" for DomainBed's random crop, flip, colour jitter and greyscale; "none" for resizing only, as
            in DomainBed's evaluation.
    """

    def __init__(self, spec: ImageSpec, augment: str) -> None:
        assert augment in ("photos", "none"), augment
        self.spec, self.augments = spec, augment == "photos"
        steps = _augmented(spec) if augment == "photos" else _resized(spec)
        self.pixels = T.Compose([*steps, T.PILToTensor(), partial(_keep_channels, spec.channels)])

    def on_host(self, images: Sequence[Image.Image] | np.ndarray) -> Tensor:
        """Augment or resize B images, or an array of them. Returns [B, C, S, S] uint8."""
        if isinstance(images, np.ndarray):
            if self._fits(images):
                return _channels_first(images)[:, : self.spec.channels].contiguous()
            images = [Image.fromarray(image) for image in images]
        return torch.stack([self.pixels(image) for image in images])

    def _fits(self, images: np.ndarray) -> bool:
        """Whether [B, h, w] or [B, h, w, 3] are pixels as the model expects them, so that Pillow changes nothing."""
        right_size = images.shape[1:3] == (self.spec.size, self.spec.size)
        return not self.augments and right_size and (images.ndim == 3) == (self.spec.channels == 1)

    def on_device(self, prepared: Tensor) -> Tensor:
        """Normalise [B, C, S, S] uint8 to float32."""
        return normalised(prepared, self.spec)


def _channels_first(images: np.ndarray) -> Tensor:
    """[B, h, w] or [B, h, w, 3] -> [B, 1 or 3, h, w]."""
    pixels = torch.from_numpy(images)
    return pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)


def normalised(pixels: Tensor, spec: ImageSpec) -> Tensor:
    """Normalise pixels [B, C, S, S] uint8 to float32, bit for bit as ToTensor and Normalize do on a CPU.

    Division may round differently on other devices, so there each value is looked up in a table computed on the CPU.
    """
    return _normalised_on_cpu(pixels, spec) if pixels.device.type == "cpu" else looked_up(pixels, spec)


def looked_up(pixels: Tensor, spec: ImageSpec) -> Tensor:
    """As `normalised`, by a table lookup; pixels [B, C, S, S] uint8 on any device."""
    channels = torch.arange(spec.channels, dtype=torch.int32, device=pixels.device).view(-1, 1, 1)
    indices = pixels.int().add_(channels, alpha=256)
    return _lookup_table(spec, pixels.device).index_select(0, indices.view(-1)).view(pixels.shape)


def _normalised_on_cpu(pixels: Tensor, spec: ImageSpec) -> Tensor:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    return pixels.float().div_(255).sub_(mean).div_(std)


@cache
def _lookup_table(spec: ImageSpec, device: torch.device) -> Tensor:
    """[C * 256] float32: the normalised value of every pixel value, for channel 0, then channel 1, and so on."""
    pixel_values = torch.arange(256, dtype=torch.uint8).expand(spec.channels, 1, 256)
    return _normalised_on_cpu(pixel_values, spec).view(-1).to(device)


def train_transform(spec: ImageSpec) -> Callable[[Image.Image], Tensor]:
    """DomainBed's training transform of one image to float32; `Exact` splits the same operations into two halves."""
    return T.Compose([*_augmented(spec), *_to_floats(spec)])


def eval_transform(spec: ImageSpec) -> Callable[[Image.Image], Tensor]:
    """DomainBed's evaluation transform: resize to a square, ignoring the aspect ratio, scale to [0, 1], normalise."""
    return T.Compose([*_resized(spec), *_to_floats(spec)])


def _augmented(spec: ImageSpec) -> list[Callable]:
    return [
        _to_mode(spec),
        T.RandomResizedCrop(spec.size, CROP_SCALE, CROP_RATIO),
        T.RandomHorizontalFlip(),
        T.ColorJitter(*JITTER),
        T.RandomGrayscale(GREY_PROBABILITY),
    ]


def _resized(spec: ImageSpec) -> list[Callable]:
    return [_to_mode(spec), T.Resize((spec.size, spec.size))]  # Pillow copies an image that already has this size


def _to_floats(spec: ImageSpec) -> list[Callable]:
    return [T.ToTensor(), partial(_keep_channels, spec.channels), T.Normalize(spec.mean, spec.std)]


def _to_mode(spec: ImageSpec) -> Callable[[Image.Image], Image.Image]:
    assert len(spec.mean) == len(spec.std) == spec.channels, spec
    return partial(_convert, MODES[spec.channels])  # a partial, because spawned workers cannot unpickle a lambda


def _convert(mode: str, image: Image.Image) -> Image.Image:
    return image.convert(mode)


def _keep_channels(channels: int, image: Tensor) -> Tensor:
    """[3, H, W] -> [channels, H, W]: a model with 2 channels gets red and green. No effect on a grey image."""
    return image[:channels]
