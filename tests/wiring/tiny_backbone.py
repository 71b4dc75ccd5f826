"""A backbone with BatchNorm for the tests: small, where a ResNet is not."""

from __future__ import annotations

from torch import nn

from gsdg.models.weights import load_weights


def tiny(weights: str | None) -> tuple[nn.Module, int]:
    """6 features from [B, 3, H, W]."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    load_weights(net, weights, imagenet=None, ignore="")
    return net, 6
