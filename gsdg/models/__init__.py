"""The model: a Classifier around a backbone, a function: weights -> (featurizer, number of features), or a module."""

from __future__ import annotations

from gsdg.models.classifier import Classifier
from gsdg.models.convnet import convnet
from gsdg.models.mlp import mlp
from gsdg.models.resnet import resnet18, resnet50
from gsdg.models.timm_backbones import efficientnet_lite0, resnet50_augmix
from gsdg.models.timm_model import timm_model
from gsdg.models.torchvision_model import torchvision_model

__all__ = [
    "Classifier",
    "convnet",
    "efficientnet_lite0",
    "mlp",
    "resnet18",
    "resnet50",
    "resnet50_augmix",
    "timm_model",
    "torchvision_model",
]
