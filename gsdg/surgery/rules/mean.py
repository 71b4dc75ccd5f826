"""The two rules without surgery: the mean of the domain gradients (w = 1 / D), which is the gradient of ERM, and their
sum (w = 1).

They take the same passes over the gradients as other rules, so that conflicts are recorded and the cost is comparable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.surgery.rules.base import Weighting


class Mean(Weighting):
    """The mean of the domain gradients: the gradient of ERM. No hyper-parameters."""

    reduction = "mean"

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        return torch.full_like(M[0], 1 / len(M))


class Sum(Weighting):
    """The sum of the domain gradients. No hyper-parameters."""

    reduction = "sum"

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        return torch.ones_like(M[0])
