"""ResNet-18 and ResNet-50 from torchvision (https://arxiv.org/abs/1512.03385), without their classifier.

Source: DomainBed's `networks.ResNet`; "imagenet" means torchvision's IMAGENET1K_V1, the weights its 2020 code used.
No deviation in the network.
"""

from __future__ import annotations

from torch import nn
from torchvision import models

from gsdg.models.weights import Pretrained, hub, load_weights, pretrained


@pretrained(hub(models.ResNet18_Weights.IMAGENET1K_V1.url))
def resnet18(weights: str | None) -> tuple[nn.Module, int]:
    """512 features from [B, 3, H, W]; weights: "imagenet", null or a state dict file."""
    return headless(models.resnet18(), weights, resnet18.imagenet)


@pretrained(hub(models.ResNet50_Weights.IMAGENET1K_V1.url))
def resnet50(weights: str | None) -> tuple[nn.Module, int]:
    """2048 features from [B, 3, H, W]; weights: "imagenet", null or a state dict file."""
    return headless(models.resnet50(), weights, resnet50.imagenet)


def headless(net: nn.Module, weights: str | None, imagenet: Pretrained) -> tuple[nn.Module, int]:
    """A ResNet without its `fc`, and how many features it returns."""
    features, net.fc = net.fc.in_features, nn.Identity()
    load_weights(net, weights, imagenet=imagenet.load, ignore="fc.")
    return net, features
