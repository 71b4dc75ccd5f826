"""Equal norms: the gradient half of DB-MTL, dual-balancing for multi-task learning (Lin et al., arXiv:2308.12029).

    update of a part = 1 / D  sum_i  (n / ||g_i||) g_i,    n = max_j ||g_j||  (or their mean)

Every domain's gradient gets the same length before the gradients are averaged.

Deviations from the paper: the mean instead of the sum, so that gradients of equal length give the gradient of ERM; the
gradients are those of the step and not their moving averages; the losses are not replaced by their logarithms.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gsdg.surgery import Weighting
from gsdg.utils.errors import check_literal

Length = Literal["max", "mean"]


class EqualNorms(Weighting):
    """The mean of the domain gradients after they were given equal length.

    Args:
        length: their common length: that of the longest one ("max", the paper's) or the mean of all lengths ("mean").
    Raises:
        UserError: for another value of `length`.
    """

    def __init__(self, *, length: Length = "max") -> None:
        check_literal("length", length, Length)
        self.length = length

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        lengths = M.diagonal().clamp_min(0).sqrt().t()  # [D, K]: ||g_i|| in part k
        longest = lengths.amax(0)  # [K]
        target = longest if self.length == "max" else lengths.mean(0)
        # A gradient that is only rounding error of the longest one stays as it is. where instead of if: no host sync.
        return torch.where(lengths > gram_eps * longest, target / lengths, 1.0) / len(M)
