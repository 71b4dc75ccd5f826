"""AND-mask (Parascandolo et al., "Learning explanations that are hard to vary", ICLR 2021, arXiv 2009.00329).

Per element: mask = 1 where |mean_i sign(g_i)| >= tau, else 0; update = mask * mean_i g_i. The caller divides the update
of a tensor by the mean of its mask, as the authors and DomainBed do.

Deviations from DomainBed:
- The comparison with tau has a tolerance of 1e-6, so that 2 of 3 equal signs reach tau = 2/3 despite rounding.
- An element whose gradient is exactly zero in all domains has the mask 1. Its update is zero either way, but in
  DomainBed it lowers the mean of the mask and so enlarges the update of the rest of its tensor: then the update of a
  single domain, or of identical domains, would not be their gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gsdg.surgery.rules.base import ElementRule, is_number
from gsdg.utils.errors import UserError

TAU_TOLERANCE = 1e-6  # far below 1 / D, the distance between two means of D signs


class AndMask(ElementRule):
    """AND-mask: the mean gradient of the elements on whose sign enough domains agree, rescaled per tensor.

    Args:
        tau: the required |mean of the signs|, in [0, 1]. 1 (DomainBed's default): all signs are equal; 0: every element
            passes, which is the mean gradient. DomainBed searches [0.5, 1].
    """

    reduction = "mean"

    def __init__(self, *, tau: float = 1.0) -> None:
        if not is_number(tau) or not 0 <= tau <= 1:
            raise UserError(f"tau is {tau!r}; it is the required |mean of the domains' signs|, a number from 0 to 1")
        self.tau = tau

    def combine(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        needed = math.ceil((self.tau - TAU_TOLERANCE) * len(rows))  # an integer: the comparison has no rounding
        passes = (majority(rows) >= needed) | ~rows.any(0)
        return torch.where(passes, rows.mean(0), 0.0), passes.to(rows.dtype)


def majority(rows: Tensor) -> Tensor:
    """|number of domains with a positive element - number with a negative one| per element of rows [D, n]: [n]."""
    return rows.sign().sum(0).abs()
