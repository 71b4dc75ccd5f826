"""Agr-Rand (Mansilla et al., "Domain Generalization via Gradient Surgery", ICCV 2021, arXiv 2108.01621).

Per element: sum_i g_i where the signs of all domains agree, else noise from N(0, sigma^2),

    sigma = scale * mean of |sum_i g_i| over the model's elements that agree        (scale = 1 in the authors' code)

The mean is over the whole model, and takes a pass of its own.

Deviations from the authors' code:
- an element that all domains leave at exactly zero stays zero, so that one domain alone keeps its gradient; an exact
  zero beside another domain's gradient counts as disagreement, as theirs does;
- where no element agrees sigma is 0; theirs is the mean of nothing, NaN.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from gsdg.errors import UserError
from gsdg.surgery.rules.agr_sum import AgrSum, agreement
from gsdg.surgery.rules.base import Reduction
from gsdg.surgery.table import wide_type


class AgrRand(AgrSum):
    """scale: the noise in units of the mean size of what is kept, >= 0; 0 is Agr-Sum. reduction: "sum" or "mean".

    The noise comes from torch's default generator of the gradients' device.
    """

    looks_first = True

    def __init__(self, *, scale: float = 1.0, reduction: Reduction = "sum") -> None:
        super().__init__(reduction=reduction)
        if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 <= scale < math.inf:
            raise UserError(
                f"scale is {scale!r}; it is the noise relative to the mean size of the elements that agree, "
                "a number >= 0 (the authors: 1)"
            )
        self.scale = scale

    def start_step(self, n_domains: int) -> None:
        self._total, self._count = 0.0, 0

    def look(self, rows: Tensor) -> None:
        agree = agreement(rows)
        kept = torch.where(agree, self._reduced(rows), 0.0)
        self._total = self._total + kept.abs().sum(dtype=wide_type(rows.device))
        self._count = self._count + agree.sum()

    def combine(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        reduced = self._reduced(rows)
        sigma = (self.scale * self._total / self._count.clamp_min(1)).to(rows.dtype)
        noise = torch.where(rows.any(0), sigma * torch.randn_like(reduced), 0.0)
        return torch.where(agreement(rows), reduced, noise), None
