"""Agr-Rand (Mansilla et al., "Domain Generalization via Gradient Surgery", ICCV 2021, arXiv 2108.01621).

Per element: sum_i g_i where the signs of all domains agree, else noise from N(0, sigma^2),

    sigma = scale * mean of |sum_i g_i| over the elements that agree        (scale = 1 in the authors' code)

The mean is over the whole model, which takes a separate pass over the gradients.

Deviations from the authors' code:
- An element whose gradient is exactly zero in all domains stays zero, so that with one domain the update is its
  gradient. An exact zero in only some of the domains counts as disagreement, as in the authors' code.
- If no element agrees, sigma is 0. In the authors' code it is then the mean of an empty tensor, NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gsdg.surgery.part_layout import wide_type
from gsdg.surgery.rules.agr_sum import AgrSum, agreement
from gsdg.surgery.rules.base import Reduction, is_number
from gsdg.utils.errors import UserError


class AgrRand(AgrSum):
    """Agr-Rand: the sum where all signs agree, random noise elsewhere.

    The noise comes from torch's default generator of the device of the gradients.

    Args:
        scale: standard deviation of the noise, relative to the mean absolute update of the elements that agree; a
            number >= 0. 0 is Agr-Sum; the authors use 1.
        reduction: "sum" or "mean" over the domains.
    """

    needs_first_pass = True

    def __init__(self, *, scale: float = 1.0, reduction: Reduction = "sum") -> None:
        super().__init__(reduction=reduction)
        if not is_number(scale) or not 0 <= scale < math.inf:
            raise UserError(
                f"scale is {scale!r}; it is the standard deviation of the noise, relative to the mean absolute update "
                "of the elements that agree, a number >= 0 (the authors use 1)"
            )
        self.scale = scale

    def start_step(self, n_domains: int) -> None:
        self._sums: tuple[Tensor, Tensor] | None = None  # the sum of |update|, and the number of elements that agree

    def first_pass(self, rows: Tensor) -> None:
        agree = agreement(rows)
        kept = torch.where(agree, self._reduced(rows), 0.0)
        total, count = kept.abs().sum(dtype=wide_type(rows.device)), agree.sum()
        self._sums = (total, count) if self._sums is None else (self._sums[0] + total, self._sums[1] + count)

    def combine(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self._sums, "`first_pass` comes first"
        total, count = self._sums
        reduced = self._reduced(rows)
        sigma = (self.scale * total / count.clamp_min(1)).to(rows.dtype)
        noise = torch.where(rows.any(0), sigma * torch.randn_like(reduced), 0.0)
        return torch.where(agreement(rows), reduced, noise), None
