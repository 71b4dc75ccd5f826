"""IMTL-G: towards impartial multi-task learning (Liu et al., ICLR 2021).

The update of a part has equal projections on all of its domains' directions: <d, g_i> / ||g_i|| is the same for all i,
d = sum_i w_i g_i, sum_i w_i = 1. So M w ~ (||g_1||, ..., ||g_D||), and w = v / sum_i v_i with v = pinv(M) sqrt(diag M).
With dependent gradients the projections are equal in the sense of least squares (arXiv 2406.16232).

Weights may be negative, and grow without bound where the sum of v goes through 0. Deliberate deviations:
- the rank is taken at eps times the largest eigenvalue;
- the weights are 0 where |sum_i v_i| <= eps * sum_i |v_i|; TorchJD compares the sum with 1e-12, whatever M's scale.
  A pair of opposite gradients has v = 0 but for rounding, which is looked for in each eigenvector alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.surgery.rules import small
from gsdg.surgery.rules.base import Weighting


class IMTLG(Weighting):
    """The update with equal projections on all domains' directions."""

    def weights(self, M: Tensor, eps: float) -> Tensor:
        M = small.normalised(M)
        values, vectors = small.eigh(M)
        terms = vectors * M.diagonal().t().sqrt()[:, None]  # [D, D, K]: coordinate i of eigenvector j times ||g_i||
        share = terms.sum(0)
        kept = (values > eps * values.amax(0)) & (share.abs() > eps * terms.abs().sum(0))
        v = small.times(vectors, torch.where(kept, share / values, 0.0))
        total = v.sum(0)
        return torch.where(total.abs() > eps * v.abs().sum(0), v / total, 0.0)
