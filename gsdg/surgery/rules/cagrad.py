"""CAGrad: conflict-averse gradient descent (Liu et al., NeurIPS 2021, arXiv 2110.14048).

Let g_0 be the mean gradient of a part. Its update is the d that maximises min_i <g_i, d> subject to
||d - g_0|| <= c ||g_0||. The solution is d = g_0 + c ||g_0|| g_w / ||g_w|| with g_w = sum_i w_i g_i, where w minimises
F(w) = <g_w, g_0> + c ||g_0|| ||g_w|| over the simplex. The weights of the domains are b + (c ||g_0|| / ||g_w||) w,
b = 1 / D.

The minimum is exact, by trying every subset S of the domains. Let k = c ||g_0||. A vector of the affine hull of S is
p - x, where p is the shortest one and x is in the span of the differences of S, to which p is orthogonal. Let q be the
projection of g_0 on that span. Then F = <p, g_0> - <x, q> + k sqrt(||p||^2 + ||x||^2) is stationary at
x = q ||p|| / sqrt(k^2 - ||q||^2), if ||q|| < k; otherwise it has no minimum there. p and q are as precise as the
differences of the gradients, also where two gradients are nearly opposite and p is nearly 0.
Every candidate is clamped to the simplex, and the candidate with the lowest F is kept. F is not differentiable at
g_w = 0; therefore the shortest vectors p, one of which is MGDA's, are candidates too.

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
from gsdg.surgery.rules.mgda import affine_hulls, on_simplex
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
        w = _candidates(M, inner, radius, rank)  # [D, S, K]
        values = (w * inner[:, None]).sum(0) + radius * _length(M, w)
        w = _batched_linalg.lowest(w, values)
        length = _length(M, w[:, None])  # [1, K]
        nonzero = _batched_linalg.exceeds_rounding(length.square(), w[:, None], M, rank)
        return 1 / len(M) + torch.where(nonzero, radius / length, 0.0) * w


def _length(M: Tensor, w: Tensor) -> Tensor:
    """||g_w|| [S, K] for w [D, S, K]."""
    return _batched_linalg.quadratic(M[:, :, None], w).clamp_min(0).sqrt()


def _candidates(M: Tensor, inner: Tensor, radius: Tensor, rank: float) -> Tensor:
    """The stationary point of F and the shortest vector on the affine hull of every subset, clamped to the simplex."""
    p, q = affine_hulls(M, inner[:, None], rank)
    q = q[:, :, 0]
    slack = radius.square() - (q * inner[:, None]).sum(0)  # k^2 - ||q||^2 [S, K]
    positive = slack > torch.finfo(M.dtype).tiny ** 0.5  # below it the inverse would overflow, as in `solve`
    ratio = torch.where(positive, _length(M, p) / slack.clamp_min(0).sqrt(), 0.0)
    stationary = p - ratio * q
    return on_simplex(torch.cat((stationary, p), dim=1))
