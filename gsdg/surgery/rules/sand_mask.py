"""SAND-mask (Shahtalebi et al., 2021, arXiv 2106.02266): an AND-mask with soft edges that asks for equal sizes too.

Per element, as in DomainBed, with the unbiased variance over the domains:

    mask = max(0, tanh(k (|mean_i sign(g_i)| - tau) / var_i(g_i)))        update = mask * mean_i g_i

The caller divides a tensor's update by the mean of its mask. The argument of tanh is not free of units: gradients s
times as large have the mask of k / s^2. Where the variance is far below k the mask is 0 or 1, an AND-mask.

Variance zero (one domain, identical domains, all of them zero) gives the full mask here. DomainBed sets the undefined
variance of one domain to 1e-17, and divides identical domains by zero, to the same mask, but masks elements that are
zero in all domains, which only enlarges the rest of the tensor.

Other deviations from DomainBed:
- tau = 1, its default, makes every mask 0 and trains nothing: refused. The default here is 0.5, the middle of the range
  that DomainBed searches;
- |mean sign| has to exceed tau by 1e-6: a tie at tau = 1/3 would become the full mask by its rounding error alone;
- the squares are those of ratios, and overflow nowhere.
DomainBed also swaps its optimizer for an Adam of the same settings; that is not part of a rule.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from gsdg.errors import UserError
from gsdg.surgery.rules.and_mask import TAU_ALLOWANCE, majority
from gsdg.surgery.rules.base import ElementRule

SATURATED = 8.0  # tanh(8^2) is 1 in float64


class SandMask(ElementRule):
    """tau: the agreement above which the mask opens, in [0, 1). k: how steeply, > 0.

    DomainBed: k = 10; it searches tau in [0, 1] and k in [1e-3, 1e5], logarithmically.
    """

    reduction = "mean"

    def __init__(self, *, tau: float = 0.5, k: float = 10.0) -> None:
        if isinstance(tau, bool) or not isinstance(tau, Real) or not 0 <= tau < 1 - TAU_ALLOWANCE:
            raise UserError(
                f"tau is {tau!r}; it is a number from 0 to below 1. At 1, DomainBed's default, every mask is 0 and "
                "nothing trains: choose a smaller one, such as 0.5"
            )
        if isinstance(k, bool) or not isinstance(k, Real) or not 0 < k < math.inf:
            raise UserError(f"k is {k!r}; it is the steepness of the mask, a number above 0 (DomainBed: 10)")
        self.tau, self.k = tau, k

    def combine(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        margin = majority(rows) / len(rows) - self.tau
        root = math.sqrt(self.k) * torch.where(margin > TAU_ALLOWANCE, margin, 0.0).sqrt()
        std = _std(rows)
        # root / std is the root of tanh's argument; std = 0 takes the other branch
        ratio = torch.where(root < SATURATED * std, root / std, SATURATED)
        mask = ratio.square().tanh()
        return mask * rows.mean(0), mask


def _std(rows: Tensor) -> Tensor:
    """rows [D, n] -> the unbiased standard deviation [n] over the domains, exactly 0 where they are identical."""
    shifted = rows - rows[0]
    deviations = shifted - shifted.mean(0)
    largest = deviations.abs().amax(0)
    ratios = torch.where(largest > 0, deviations / largest, 0.0)
    return largest * (ratios.square().sum(0) / max(1, len(rows) - 1)).sqrt()
