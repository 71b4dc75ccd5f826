"""AND-mask (Parascandolo et al., "Learning explanations that are hard to vary", ICLR 2021, arXiv 2009.00329).

Per element: mask = 1 where |mean_i sign(g_i)| >= tau, else 0; update = mask * mean_i g_i. The caller divides a tensor's
update by the mean of its mask, as the authors and DomainBed do.

Deviations from DomainBed:
- tau is compared with an allowance of 1e-6: two votes of three do reach tau = 2/3, whatever way both are rounded;
- an element that all domains leave at exactly zero passes. Its update is zero either way, but there it lowers the mean
  of the mask and so enlarges the rest of its tensor: one domain alone, or identical ones, would not keep its gradient.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from gsdg.errors import UserError
from gsdg.surgery.rules.base import ElementRule

TAU_ALLOWANCE = 1e-6  # far below 1 / D, the distance between two means of D signs


class AndMask(ElementRule):
    """tau: the agreement asked for, in [0, 1]. 1: all signs are equal; 0: everything passes, the mean.

    1 is DomainBed's default; it searches [0.5, 1].
    """

    reduction = "mean"

    def __init__(self, *, tau: float = 1.0) -> None:
        if isinstance(tau, bool) or not isinstance(tau, Real) or not 0 <= tau <= 1:
            raise UserError(f"tau is {tau!r}; it is the least |mean of the domains' signs|, a number from 0 to 1")
        self.tau = tau

    def combine(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        needed = math.ceil((self.tau - TAU_ALLOWANCE) * len(rows))  # of D votes: no rounding in the comparison
        passes = (majority(rows) >= needed) | ~rows.any(0)
        return torch.where(passes, rows.mean(0), 0.0), passes.to(rows.dtype)


def majority(rows: Tensor) -> Tensor:
    """rows [D, n] -> [n], |domains with a positive element - domains with a negative one|, a whole number."""
    return rows.sign().sum(0).abs()
