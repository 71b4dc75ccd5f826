"""Aligned-MTL: independent component alignment for multi-task learning (Senushkin et al., CVPR 2023, arXiv 2305.19000).

The matrix of a part's gradients is replaced by the closest one whose principal components are all of one length: the
Gram matrix M = V L V^T becomes scale * V V^T. The domains' weights are w = B p, B = sqrt(scale) V L^-1/2 V^T over the
eigenvalues that are not 0, p_i = 1 / D. scale is an eigenvalue: the smallest, or the "median" or the mean ("rmse").

Deliberate deviation: an eigenvalue counts as 0 where it is no larger than its rounding error, which is relative to the
lengths of the gradients that its eigenvector combines (see `precision.py`). The authors compare it with the largest
eigenvalue times the machine's epsilon of M's type, and so drop the direction of a short gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gsdg.errors import check_literal
from gsdg.surgery.rules import small
from gsdg.surgery.rules.base import Weighting
from gsdg.surgery.rules.precision import rank_eps

ScaleMode = Literal["min", "median", "rmse"]


class AlignedMTL(Weighting):
    """The mean of gradients whose principal components were all given one length.

    scale_mode: that length squared is the "min", the lower "median" or the mean ("rmse") of the eigenvalues above 0.
    """

    def __init__(self, *, scale_mode: ScaleMode = "min") -> None:
        check_literal("scale_mode", scale_mode, ScaleMode)
        self.scale_mode = scale_mode

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        M = small.normalised(M)
        values, vectors = small.eigh(M)
        kept = small.exceeds_rounding(values, vectors, M, rank_eps(gram_eps))
        factors = torch.where(kept, (self._scale(values, kept) / values).sqrt(), 0.0)  # [D, K]
        w = small.times(vectors, factors * vectors.mean(0))
        return torch.where(kept.any(0), w, 1 / len(M))

    def _scale(self, values: Tensor, kept: Tensor) -> Tensor:
        """values [D, K] -> the eigenvalue [K] that all are given; anything where none is kept."""
        rank = kept.sum(0)
        if self.scale_mode == "rmse":
            return torch.where(kept, values, 0.0).sum(0) / rank
        ascending = torch.where(kept, values, torch.inf).sort(0).values
        middle = (rank - 1).clamp_min(0) // 2 if self.scale_mode == "median" else torch.zeros_like(rank)
        return ascending.gather(0, middle[None]).squeeze(0)
