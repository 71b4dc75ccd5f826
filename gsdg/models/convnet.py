"""A small convolutional network for 28 x 28 digits, fast enough for a laptop.

Source: the architecture of DomainBed's `networks.MNIST_CNN` (3 x 3 convolutions, GroupNorm, global average pooling).

Deliberate deviations: it has one sixteenth of the multiplications (half the width, and the first layer is strided as
well), so that forward and backward passes of 5 domains x 32 digits take about 60 ms on one core. Most channels are in
the layers at 7 x 7.
"""

from __future__ import annotations

from torch import nn

from gsdg.models.weights import load_weights
from gsdg.utils.errors import UserError

FEATURES = 64


def convnet(weights: str | None, *, channels: int = 1) -> tuple[nn.Module, int]:
    """The network without a head: [B, channels, H, W] -> 64 features. It has no BatchNorm.

    Args:
        weights: null (random), or the path of a state dict file.
        channels: of the images, 1 to 3: the length of model.mean.
    """
    if channels not in (1, 2, 3):
        raise UserError(f"model.backbone.channels={channels}: it must be the length of model.mean. Valid: 1, 2, 3.")
    featurizer = nn.Sequential(  # shapes for 28 x 28 digits
        *_block(channels, 32, stride=2),  # [B, 32, 14, 14]
        *_block(32, FEATURES, stride=2),  # [B, 64, 7, 7]
        *_block(FEATURES, FEATURES, stride=1),
        *_block(FEATURES, FEATURES, stride=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),  # [B, 64]
    )
    load_weights(featurizer, weights, imagenet=None, ignore="")
    return featurizer, FEATURES


def _block(inputs: int, outputs: int, *, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.ReLU(), nn.GroupNorm(8, outputs)]
