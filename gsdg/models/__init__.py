"""The model: a Classifier around a backbone. A backbone is a function: weights -> (featurizer, number of features)."""

from __future__ import annotations

from gsdg.models.classifier import Classifier
from gsdg.models.convnet import convnet
from gsdg.models.mlp import mlp
from gsdg.models.resnet import resnet18, resnet50
from gsdg.models.timm_backbones import efficientnet_lite0, resnet50_augmix

__all__ = ["Classifier", "convnet", "efficientnet_lite0", "mlp", "resnet18", "resnet50", "resnet50_augmix"]
