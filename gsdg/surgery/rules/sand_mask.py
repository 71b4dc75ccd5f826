"""SAND-mask (Shahtalebi et al., 2021, arXiv 2106.02266): a soft AND-mask that also requires similar magnitudes.

Per element, as in DomainBed, with the unbiased variance over the domains:

    mask = max(0, tanh(k (|mean_i sign(g_i)| - tau) / var_i(g_i)))        update = mask * mean_i g_i

The caller divides the update of a tensor by the mean of its mask. The argument of tanh is not scale-free: gradients
scaled by s have the mask of k / s^2. If the variance is far below k, the mask is 0 or 1, as in AND-mask.

If the variance is zero (one domain, identical domains, or all gradients zero), the mask is 1 here. DomainBed arrives at
the same mask for one domain, whose undefined variance it sets to 1e-17, and for identical domains, by a division by
zero. It masks elements that are zero in all domains, which only enlarges the update of the rest of the tensor.

Other deviations from DomainBed:
- tau = 1, its default, makes every mask 0, so that nothing is trained: refused. The default here is 0.5, the middle of
  the range that DomainBed searches.
- |mean sign| must exceed tau by 1e-6: otherwise a tie at tau = 1/3 would get the mask 1 by rounding alone.
- Ratios are squared instead of gradients, so that no square overflows.
DomainBed also replaces its optimizer by an Adam with the same settings; that is not part of a rule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gsdg.surgery.rules.and_mask import TAU_TOLERANCE, majority
from gsdg.surgery.rules.base import ElementRule, is_number
from gsdg.utils.errors import UserError

SATURATED = 8.0  # tanh(8^2) is 1 in float64


class SandMask(ElementRule):
    """SAND-mask: the mean gradient times a soft mask of the agreement of the domains, rescaled per tensor.

    Args:
        tau: the |mean of the signs| above which the mask is positive, in [0, 1). DomainBed searches [0, 1].
        k: the steepness of the mask, > 0. DomainBed uses 10 and searches [1e-3, 1e5] on a log scale.
    """

    reduction = "mean"

    def __init__(self, *, tau: float = 0.5, k: float = 10.0) -> None:
        if not is_number(tau) or not 0 <= tau < 1 - TAU_TOLERANCE:
            raise UserError(
                f"tau is {tau!r}; it is a number from 0 to below 1. At 1, DomainBed's default, every mask is 0 and "
                "nothing trains: choose a smaller value, such as 0.5"
            )
        if not is_number(k) or not 0 < k < math.inf:
            raise UserError(f"k is {k!r}; it is the steepness of the mask, a number above 0 (DomainBed: 10)")
        self.tau, self.k = tau, k

    def combine(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        margin = majority(rows) / len(rows) - self.tau
        root = math.sqrt(self.k) * torch.where(margin > TAU_TOLERANCE, margin, 0.0).sqrt()
        std = _std(rows)
        # root / std is the square root of the argument of tanh; std = 0 selects the other branch
        ratio = torch.where(root < SATURATED * std, root / std, SATURATED)
        mask = ratio.square().tanh()
        return mask * rows.mean(0), mask


def _std(rows: Tensor) -> Tensor:
    """The unbiased standard deviation [n] of rows [D, n] over the domains; exactly 0 for identical domains."""
    shifted = rows - rows[0]
    deviations = shifted - shifted.mean(0)
    largest = deviations.abs().amax(0)
    ratios = torch.where(largest > 0, deviations / largest, 0.0)
    return largest * (ratios.square().sum(0) / max(1, len(rows) - 1)).sqrt()
