"""The base class of test-time adaptation."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gsdg.algorithms import Algorithm
from gsdg.models.classifier import Classifier
from gsdg.utils.errors import UserError


class Adaptation(nn.Module, ABC):
    """A trained algorithm that adapts to the unlabelled images of one domain while it predicts them, batch by batch.

    Subclasses take keyword-only hyper-parameters and check their values in `__init__`.

    Attributes:
        batch_dependent: the prediction for an image depends on the images beside it and before it.
        replaces_statistics: whether BatchNorm gets other statistics than those of training.
        algorithm: after `setup`, a copy of the trained algorithm.
    """

    batch_dependent = True
    replaces_statistics: ClassVar[bool] = False
    algorithm: Algorithm

    def setup(self, algorithm: Algorithm) -> None:
        """Start from a copy of the trained algorithm, which itself stays as it is.

        Raises:
            UserError: the algorithm's own prediction adapts to the batch already, or the model has no part that this
                method could adapt.
        """
        if algorithm.batch_dependent:
            raise UserError(
                f"{type(algorithm).__name__} already predicts from all images of a batch, so {type(self).__name__} is "
                "refused.\nEvaluate the run without --adapt, or adapt a run of another algorithm."
            )
        self.algorithm = copy.deepcopy(algorithm).eval()

    @property
    def model(self) -> Classifier:
        return self.algorithm.model

    @abstractmethod
    def predict(self, images: Tensor) -> Tensor:
        """Adapt to images [B, C, H, W] and return their logits [B, classes]."""


def entropies(logits: Tensor) -> Tensor:
    """[B]: the entropy of softmax(logits) of each image, in nats."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def batchnorm_layers(adaptation: Adaptation) -> list[_BatchNorm]:
    """The model's BatchNorm layers that have running statistics. UserError: there are none."""
    layers = [layer for layer in adaptation.model.modules() if isinstance(layer, _BatchNorm)]
    layers = [layer for layer in layers if layer.running_mean is not None]
    if not layers:
        raise UserError(
            f"{type(adaptation).__name__} adapts BatchNorm layers, and the model of this run has none.\n"
            "Use --adapt t3a, which adapts the head, or a run of another model, such as model=resnet18."
        )
    return layers
