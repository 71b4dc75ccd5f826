"""What the three training loops share: the digits that ship with gsdg, by rotation, and a small network."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from gsdg.data.digits import RotatedDigits
from gsdg.models import convnet

SOURCES, TARGET = ("0", "30", "60"), "75"  # domains: rotations in degrees


def read_digits() -> dict[str, tuple[Tensor, Tensor]]:
    """{domain: (images [N, 1, 28, 28] float32 in [0, 1], labels [N] int64)}, about 450 digits each."""
    dataset = RotatedDigits(name="digits", domains=[*SOURCES, TARGET]).read()
    pixels = {name: np.asarray(domain.images(np.arange(len(domain)))) for name, domain in dataset.domains.items()}
    images = {name: torch.from_numpy(array)[:, None] / 255 for name, array in pixels.items()}
    return {name: (images[name], torch.from_numpy(domain.labels)) for name, domain in dataset.domains.items()}


def network() -> nn.Module:
    """[B, 1, 28, 28] -> logits [B, 10]."""
    featurizer, features = convnet(None)
    return nn.Sequential(featurizer, nn.Linear(features, 10))


def draw(domain: tuple[Tensor, Tensor], size: int = 32) -> tuple[Tensor, Tensor]:
    """A random minibatch of one domain: images [size, 1, 28, 28] and labels [size]."""
    images, labels = domain
    rows = torch.randint(len(labels), (size,))
    return images[rows], labels[rows]


@torch.no_grad()
def accuracy(model: nn.Module, domain: tuple[Tensor, Tensor]) -> float:
    """The share of a domain's images whose label has the highest logit."""
    images, labels = domain
    return (model(images).argmax(1) == labels).float().mean().item()
