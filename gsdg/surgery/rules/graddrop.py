"""GradDrop (Chen et al., "Just Pick a Sign", NeurIPS 2020, arXiv 2010.06808).

Per element, one U ~ Uniform[0, 1) for all domains:

    P = (1 + sum_i g_i / sum_i |g_i|) / 2,   the share of the positive domains in sum_i |g_i|
    kept = sum of the positive g_i if P > U, else sum of the negative g_i
    update = leak sum_i g_i + (1 - leak) kept

The mean of the update over U is sum_i g_i, whatever the leak.

Deviations:
- the paper acts on the gradients of an activation that the tasks share, times its sign and summed over the batch, and
  the authors' code restores the norm afterwards; here, as in TorchJD, on those of the parameters, with their norm as
  it comes;
- one leak for all domains, not one each;
- P = U keeps the negative elements; the paper and TorchJD keep neither, which drops a unanimously negative element
  where U = 0. Zeros in all domains give 0; TorchJD divides 0 by 0, and drops the NaN too.
"""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from gsdg.errors import UserError
from gsdg.surgery.rules.base import ElementRule


class GradDrop(ElementRule):
    """leak: the share of the plain sum in the update, in [0, 1]; 0 is the paper's, 1 drops nothing.

    U comes from torch's default generator of the gradients' device.
    """

    reduction = "sum"

    def __init__(self, *, leak: float = 0.0) -> None:
        if isinstance(leak, bool) or not isinstance(leak, Real) or not 0 <= leak <= 1:
            raise UserError(f"leak is {leak!r}; it is the share of each gradient never dropped, a number from 0 to 1")
        self.leak = leak

    def combine(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        positive, negative = rows.clamp_min(0).sum(0), rows.clamp_max(0).sum(0)
        purity = positive / (positive - negative)  # NaN where all are zero: above nothing, and `negative` is 0 there
        kept = torch.where(purity > torch.rand_like(purity), positive, negative)
        return self.leak * (positive + negative) + (1 - self.leak) * kept, None
