"""IMTL-G: towards impartial multi-task learning (Liu et al., ICLR 2021).

The update of a part has equal projections on all of its domains' directions: <d, g_i> / ||g_i|| is the same for all i,
d = sum_i w_i g_i, sum_i w_i = 1. With the cosines C of the gradients and w_i = y_i / ||g_i|| that is C y ~ (1, ..., 1):
the lengths are in the last division only, and gradients of any ratio of lengths have the digits of their cosines.

Weights may be negative, and grow without bound where their sum goes through 0. Deliberate deviations:
- with dependent gradients y = pinv(C) 1, so that the projections are equal in the sense of least squares. TorchJD's
  pinv(M) sqrt(diag M) (arXiv 2406.16232) counts each projection by its gradient's length squared, and loses those of
  short gradients to rounding. With independent gradients both are one;
- the weights are 0 where |sum_i w_i| <= gram_eps * sum_i |w_i|; TorchJD compares the sum with 1e-12, whatever its
  scale. A pair of opposite gradients has y = 0 but for rounding, which is looked for in each eigenvector alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.surgery.rules import small
from gsdg.surgery.rules.base import Weighting
from gsdg.surgery.rules.precision import rank_eps


class IMTLG(Weighting):
    """The update with equal projections on all domains' directions."""

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        C, inverse = small.cosines(small.normalised(M))
        values, vectors = small.eigh(C)
        share = vectors.sum(0)  # <eigenvector, (1, ..., 1)> [D, K]
        independent = small.exceeds_rounding(values, vectors, C, rank_eps(gram_eps))
        kept = independent & (share.abs() > gram_eps * vectors.abs().sum(0))
        w = inverse * small.times(vectors, torch.where(kept, share / values, 0.0))
        total = w.sum(0)
        return torch.where(total.abs() > gram_eps * w.abs().sum(0), w / total, 0.0)
