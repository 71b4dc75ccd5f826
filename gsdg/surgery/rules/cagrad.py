"""CAGrad: conflict-averse gradient descent (Liu et al., NeurIPS 2021, arXiv 2110.14048).

Let g_0 be the mean gradient of a part. Its update is the d that maximises min_i <g_i, d> subject to
||d - g_0|| <= c ||g_0||. The solution is d = g_0 + c ||g_0|| g_w / ||g_w|| with g_w = sum_i w_i g_i, where w minimises
F(w) = <g_w, g_0> + c ||g_0|| ||g_w|| over the simplex. The weights of the domains are b + (c ||g_0|| / ||g_w||) w,
b = 1 / D.

The minimum is exact, by trying every subset S of the domains. Let k = c ||g_0||, A = M_SS^-1 1, B = M_SS^-1 (M b)_S,
a = 1^T A, b1 = 1^T B and b2 = B^T (M b)_S. F is stationary on the affine hull of S where
(M b)_S + (k / ||g_w||) M_SS w = mu 1, so that w is mu A - B up to a factor. Inserting w into ||g_w|| gives
k^2 = a mu^2 - 2 b1 mu + b2. The sum of w is positive for the larger root, mu = (b1 + sqrt(b1^2 - a (b2 - k^2))) / a.
Every candidate is clamped to the simplex, and the candidate with the lowest F is kept. F is not differentiable at
g_w = 0; therefore the w of MGDA, which has the shortest g_w, is one more candidate.

Deliberate deviations:
- If g_w vanishes (||g_w||^2 <= rank_eps (sum_i w_i ||g_i||)^2), d is g_0. In TorchJD d is then 0, so that one domain
  without a gradient stops the training of the part.
- The update is divided by 1 + c, so that equal gradients g give g, as with every rule here. The authors' code offers
  this besides its default, 1 + c^2; the paper and TorchJD do not divide (`rescale=False`), which gives (1 + c) g.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gsdg.surgery.rules import _batched_linalg
from gsdg.surgery.rules.base import Weighting, is_number
from gsdg.surgery.rules.mgda import shortest
from gsdg.surgery.rules.precision import rank_eps
from gsdg.utils.errors import UserError


class CAGrad(Weighting):
    """CAGrad: the update near the mean gradient that improves the worst domain most. Up to 8 domains.

    Args:
        c: the largest distance from the mean gradient, relative to its length, >= 0; 0 is the mean gradient. The
            authors use 0.5.
        rescale: whether to divide the update by 1 + c.
    """

    def __init__(self, *, c: float = 0.5, rescale: bool = True) -> None:
        if not is_number(c) or not 0 <= c < math.inf:
            raise UserError(f"c is {c!r}; it is a distance relative to the length of the mean gradient, a number >= 0")
        self.c, self.rescale = c, rescale

    def start_step(self, n_domains: int) -> None:
        _batched_linalg.check_n_domains("CAGrad", n_domains)

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        w = _batched_linalg.map_parts(lambda M: self._weights(M, rank_eps(gram_eps)), _batched_linalg.normalised(M))
        return w / (1 + self.c) if self.rescale else w

    def _weights(self, M: Tensor, rank: float) -> Tensor:
        inner = M.mean(1)  # <g_i, g_0> [D, K]
        radius = self.c * inner.mean(0).clamp_min(0).sqrt()  # c ||g_0|| [K]
        w = torch.cat((_stationary(M, inner, radius, rank), shortest(M, rank)[:, None]), dim=1)  # [D, S, K]
        values = (w * inner[:, None]).sum(0) + radius * _length(M, w)
        w = _batched_linalg.lowest(w, values)
        length = _length(M, w[:, None])  # [1, K]
        nonzero = _batched_linalg.exceeds_rounding(length.square(), w[:, None], M, rank)
        return 1 / len(M) + torch.where(nonzero, radius / length, 0.0) * w


def _length(M: Tensor, w: Tensor) -> Tensor:
    """||g_w|| [S, K] for w [D, S, K]."""
    return _batched_linalg.quadratic(M[:, :, None], w).clamp_min(0).sqrt()


def _stationary(M: Tensor, inner: Tensor, radius: Tensor, rank: float) -> Tensor:
    """The stationary point of F on the affine hull of every subset, clamped to the simplex: [D, S, K]."""
    mask = _batched_linalg.subsets(len(M), M.device)[:, 1:]  # [D, S, 1]
    inner = torch.where(mask, inner[:, None], 0.0)  # [D, S, K]
    right = torch.stack((mask.to(M.dtype).expand_as(inner), inner), dim=2)  # [D, S, 2, K]
    A, B = _batched_linalg.solve(_batched_linalg.submatrix(mask, M[:, :, None])[:, :, :, None], right, rank).unbind(2)
    a, b1, b2 = A.sum(0), B.sum(0), (B * inner).sum(0)  # [S, K]
    root = (b1.square() - a * (b2 - radius.square())).clamp_min(0).sqrt()
    w = torch.where(a > 0, (b1 + root) / a * A - B, 0.0).clamp_min(0)
    total = w.sum(0)
    return torch.where(total > 0, w / total, mask / mask.sum(0))
