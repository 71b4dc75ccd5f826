"""ResNet-18 and ResNet-50 from torchvision (https://arxiv.org/abs/1512.03385), without their classifier.

Source: DomainBed's `networks.ResNet`; "imagenet" means torchvision's IMAGENET1K_V1, the weights that DomainBed used in
2020. The network has no deviation.
"""

from __future__ import annotations

from torch import nn
from torchvision import models

from gsdg.models.weights import Pretrained, hub, load_weights, pretrained


@pretrained(hub(models.ResNet18_Weights.IMAGENET1K_V1.url))
def resnet18(weights: str | None) -> tuple[nn.Module, int]:
    """ResNet-18: [B, 3, H, W] -> 512 features. weights: "imagenet", null (random) or the path of a state dict file."""
    return headless(models.resnet18(), weights, resnet18.imagenet)


@pretrained(hub(models.ResNet50_Weights.IMAGENET1K_V1.url))
def resnet50(weights: str | None) -> tuple[nn.Module, int]:
    """ResNet-50: [B, 3, H, W] -> 2048 features. weights: "imagenet", null (random) or the path of a state dict file."""
    return headless(models.resnet50(), weights, resnet50.imagenet)


def headless(net: nn.Module, weights: str | None, imagenet: Pretrained) -> tuple[nn.Module, int]:
    """Remove the classifier `fc` of a ResNet and load weights; returns the network and its number of features."""
    classifier = net.get_submodule("fc")
    assert isinstance(classifier, nn.Linear), classifier
    net.add_module("fc", nn.Identity())
    load_weights(net, weights, imagenet=imagenet.load, ignore="fc.")
    return net, classifier.in_features
