"""A small convnet for 28 x 28 digits, cheap enough for a laptop.

Source: the idea of DomainBed's `networks.MNIST_CNN` (3 x 3 convolutions, GroupNorm, global average pooling).

Deliberate deviations: a sixteenth of its multiplications (half as wide, and the stem is strided too), so that forward
and backward of 5 domains x 32 digits take about 60 ms on one core. Width was spent where the images are 7 x 7.
"""

from __future__ import annotations

from torch import nn

from gsdg.errors import UserError
from gsdg.models.weights import load_weights

FEATURES = 64


def convnet(weights: str | None, *, channels: int = 1) -> tuple[nn.Module, int]:
    """64 features from [B, channels, H, W]; weights: null or a state dict file. It has no BatchNorm to freeze."""
    if channels not in (1, 2, 3):
        raise UserError(f"model.backbone.channels={channels}: as many as model.mean has numbers. Valid: 1, 2, 3.")
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
