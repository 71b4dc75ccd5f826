"""GradDrop (Chen et al., "Just Pick a Sign", NeurIPS 2020, arXiv 2010.06808).

Per element, one U ~ Uniform[0, 1) for all domains:

    P = (1 + sum_i g_i / sum_i |g_i|) / 2,   the share of the positive domains in sum_i |g_i|
    kept = sum of the positive g_i if P > U, else sum of the negative g_i
    update = leak sum_i g_i + (1 - leak) kept

The mean of the update over U is sum_i g_i, for every leak.

Deviations:
- The paper acts on the gradients of an activation that the tasks share, multiplied by its sign and summed over the
  batch, and the authors' code restores the norm afterwards. Here, as in TorchJD, the rule acts on the gradients of the
  parameters and does not restore the norm.
- All domains share one leak, instead of one leak per domain.
- P = U keeps the negative elements. The paper and TorchJD then keep neither, so that an element that is negative in all
  domains is dropped when U = 0. If all domains are zero, the update is 0; TorchJD divides 0 by 0 and drops the NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.surgery.rules.base import ElementRule, is_number
from gsdg.utils.errors import UserError


class GradDrop(ElementRule):
    """GradDrop: a random sign is drawn per element, and the gradients of that sign are summed.

    U comes from torch's default generator of the device of the gradients.

    Args:
        leak: the share of the plain sum in the update, in [0, 1]; 0 (the paper): GradDrop, 1: the plain sum.
    """

    reduction = "sum"

    def __init__(self, *, leak: float = 0.0) -> None:
        if not is_number(leak) or not 0 <= leak <= 1:
            raise UserError(f"leak is {leak!r}; it is the share of the plain sum in the update, a number from 0 to 1")
        self.leak = leak

    def combine(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        positive, negative = rows.clamp_min(0).sum(0), rows.clamp_max(0).sum(0)
        purity = positive / (positive - negative)  # NaN if all are zero: the comparison is False and `negative` is 0
        kept = torch.where(purity > torch.rand_like(purity), positive, negative)
        return self.leak * (positive + negative) + (1 - self.leak) * kept, None
