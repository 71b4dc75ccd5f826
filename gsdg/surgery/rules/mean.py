"""The two rules that change nothing: the domains' mean, which is ERM's gradient, and their sum.

    w = 1 / D        w = 1

They take the same passes as the others, so that their conflicts are recorded too and their cost is comparable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.surgery.rules.base import Weighting


class Mean(Weighting):
    """No hyper-parameters."""

    reduction = "mean"

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        return torch.full_like(M[0], 1 / len(M))


class Sum(Weighting):
    """No hyper-parameters."""

    reduction = "sum"

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        return torch.ones_like(M[0])
