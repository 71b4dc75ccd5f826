"""ResNet-18 and ResNet-50 from torchvision (https://arxiv.org/abs/1512.03385), without their classifier.

Source: DomainBed's `networks.ResNet`; "imagenet" means torchvision's IMAGENET1K_V1, the weights its 2020 code used.
No deviation in the network.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torchvision import models

from gsdg.models.weights import hub_state, load_weights


def resnet18(weights: str | None) -> tuple[nn.Module, int]:
    """512 features from [B, 3, H, W]; weights: "imagenet", null or a state dict file."""
    return headless(models.resnet18(), weights, models.ResNet18_Weights.IMAGENET1K_V1.url)


def resnet50(weights: str | None) -> tuple[nn.Module, int]:
    """2048 features from [B, 3, H, W]; weights: "imagenet", null or a state dict file."""
    return headless(models.resnet50(), weights, models.ResNet50_Weights.IMAGENET1K_V1.url)


def headless(net: nn.Module, weights: str | None, url: str) -> tuple[nn.Module, int]:
    """A ResNet without its `fc`, and how many features it returns; `url` is where its ImageNet weights are."""
    features, net.fc = net.fc.in_features, nn.Identity()
    load_weights(net, weights, imagenet=partial(hub_state, url), ignore="fc.")
    return net, features
