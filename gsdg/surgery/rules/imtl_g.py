"""IMTL-G: towards impartial multi-task learning (Liu et al., ICLR 2021).

The update d = sum_i w_i g_i of a part, with sum_i w_i = 1, has equal projections onto the directions of all domains:
<d, g_i> / ||g_i|| is the same for all i. With the cosines C of the gradients and w_i = y_i / ||g_i|| this is
C y ~ (1, ..., 1). The lengths occur only in the last division, so that the result is as precise as the cosines, however
much the lengths differ.

Weights may be negative, and they grow without bound where their sum passes through 0. Deliberate deviations:
- For dependent gradients y = pinv(C) 1, which makes the projections equal in the least-squares sense. TorchJD's
  pinv(M) sqrt(diag M) (arXiv 2406.16232) weights each projection by the squared length of its gradient, and loses those
  of short gradients to rounding. For independent gradients both are the same.
- The weights are 0 if |sum_i w_i| <= gram_eps * sum_i |w_i|. TorchJD compares the sum with 1e-12, independently of the
  scale. A pair of opposite gradients has y = 0 up to rounding; each eigenvector is tested for this separately.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.surgery.rules import _batched_linalg
from gsdg.surgery.rules.base import Weighting
from gsdg.surgery.rules.precision import rank_eps


class IMTLG(Weighting):
    """IMTL-G: the update with equal projections onto the directions of all domain gradients."""

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        C, inverse = _batched_linalg.cosines(_batched_linalg.normalised(M))
        values, vectors = _batched_linalg.eigh(C)
        share = vectors.sum(0)  # <eigenvector, (1, ..., 1)> [D, K]
        independent = _batched_linalg.exceeds_rounding(values, vectors, C, rank_eps(gram_eps))
        used = independent & (share.abs() > gram_eps * vectors.abs().sum(0))
        w = inverse * _batched_linalg.matvec(vectors, torch.where(used, share / values, 0.0))
        total = w.sum(0)
        return torch.where(total.abs() > gram_eps * w.abs().sum(0), w / total, 0.0)
