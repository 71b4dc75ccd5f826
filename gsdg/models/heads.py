"""Heads: features [B, F] -> logits [B, classes].

    linear  one linear layer with bias
    none    the features are the logits, as in the GradSurgery release
    mlp     F -> F / 2 -> F / 4 -> classes with ReLU, DomainBed's nonlinear classifier; widths are rounded down
    cosine  s cos(z, w_c), the cosine similarity of the features and a weight per class, times a trained scale s

Source of `cosine`: Gidaris and Komodakis, CVPR 2018, arXiv:1804.09458, with their start s = 10; the classifier of
Baseline++ (Chen et al., "A Closer Look at Few-shot Classification", ICLR 2019, arXiv:1904.04232) is of the same kind.

Deviations: the authors' code of the former adds a scalar bias to all logits, which changes no probability; that of
Baseline++ trains a norm per class and multiplies by a constant 2 or 30. The weights start as those of nn.Linear.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.utils.errors import UserError

Head = Literal["linear", "none", "mlp", "cosine"]
SCALE = 10.0  # of the cosines, at the start
SHORTEST = 1e-6  # features with a smaller norm are divided by this instead: no infinite gradients where they are all 0


def make_head(kind: Head, features: int, classes: int) -> nn.Module:
    """The head of a kind, with random weights. UserError for too few features."""
    if kind == "linear":
        return nn.Linear(features, classes)
    if kind == "cosine":
        return Cosine(features, classes)
    if kind == "mlp":
        return mlp_head(features, classes)
    if classes > features:
        raise UserError(
            f"model.head=none uses the {features} features as logits, but the data set has {classes} classes: "
            "use model.head=linear or a wider model"
        )
    return nn.Identity()


def mlp_head(features: int, classes: int) -> nn.Module:
    if features < 4:
        raise UserError(f"model.head=mlp needs 4 features or more, found {features}: use model.head=linear")
    half, quarter = features // 2, features // 4
    layers = [nn.Linear(features, half), nn.ReLU(), nn.Linear(half, quarter), nn.ReLU(), nn.Linear(quarter, classes)]
    return nn.Sequential(*layers)


class Cosine(nn.Module):
    """The scaled cosine similarity of features [B, F] and class weights [classes, F]."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Linear(features, classes, bias=False).weight
        self.scale = nn.Parameter(torch.tensor(SCALE))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.normalize(features, dim=1, eps=SHORTEST) @ F.normalize(self.weight, dim=1).T
