"""Aligned-MTL: independent component alignment for multi-task learning (Senushkin et al., CVPR 2023, arXiv 2305.19000).

The matrix of the domain gradients of a part is replaced by the closest matrix whose principal components all have equal
length: the Gram matrix M = V L V^T becomes scale * V V^T. The weights of the domains are w = B p with
B = sqrt(scale) V L^-1/2 V^T, restricted to the eigenvalues that are not 0, and p_i = 1 / D. scale is the smallest
eigenvalue ("min"), the median ("median") or the mean ("rmse").

Deliberate deviation: an eigenvalue counts as 0 if it is at most its rounding error, which is relative to the lengths of
the gradients that its eigenvector combines (see `precision.py`). The authors compare it with the largest eigenvalue
times the machine epsilon of M's dtype, and so discard the direction of a short gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gsdg.surgery.rules import _batched_linalg
from gsdg.surgery.rules.base import Weighting
from gsdg.surgery.rules.precision import rank_eps
from gsdg.utils.errors import check_literal

ScaleMode = Literal["min", "median", "rmse"]


class AlignedMTL(Weighting):
    """Aligned-MTL: the mean of the domain gradients after their principal components were given equal length.

    Args:
        scale_mode: the square of that length is the "min", the lower "median" or the mean ("rmse") of the eigenvalues
            above 0.
    """

    def __init__(self, *, scale_mode: ScaleMode = "min") -> None:
        check_literal("scale_mode", scale_mode, ScaleMode)
        self.scale_mode = scale_mode

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        M = _batched_linalg.normalised(M)
        values, vectors = _batched_linalg.eigh(M)
        nonzero = _batched_linalg.exceeds_rounding(values, vectors, M, rank_eps(gram_eps))
        factors = torch.where(nonzero, (self._scale(values, nonzero) / values).sqrt(), 0.0)  # [D, K]
        w = _batched_linalg.matvec(vectors, factors * vectors.mean(0))
        return torch.where(nonzero.any(0), w, 1 / len(M))

    def _scale(self, values: Tensor, nonzero: Tensor) -> Tensor:
        """The common eigenvalue [K] from eigenvalues [D, K]; meaningless for parts without a nonzero eigenvalue."""
        rank = nonzero.sum(0)
        if self.scale_mode == "rmse":
            return torch.where(nonzero, values, 0.0).sum(0) / rank
        ascending = torch.where(nonzero, values, torch.inf).sort(0).values
        middle = (rank - 1).clamp_min(0) // 2 if self.scale_mode == "median" else torch.zeros_like(rank)
        return ascending.gather(0, middle[None]).squeeze(0)
