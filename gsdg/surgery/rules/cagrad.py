"""CAGrad: conflict-averse gradient descent (Liu et al., NeurIPS 2021, arXiv 2110.14048).

The update of a part is the d that maximises min_i <g_i, d> with ||d - g_0|| <= c ||g_0||, g_0 the mean gradient:
d = g_0 + c ||g_0|| g_w / ||g_w||, where w minimises F(w) = <g_w, g_0> + c ||g_0|| ||g_w|| over the simplex and
g_w = sum_i w_i g_i. The weights are b + (c ||g_0|| / ||g_w||) w, b = 1 / D.

Exact, by trying every subset S of the domains. With k = c ||g_0||, A = M_SS^-1 1 and B = M_SS^-1 (M b)_S, and
a = 1^T A, b1 = 1^T B, b2 = B^T (M b)_S: where F is stationary on the affine hull of S, (M b)_S + (k / ||g_w||) M_SS w
= mu 1, so w is mu A - B up to a factor. ||g_w|| = ||g_w|| makes it k^2 = a mu^2 - 2 b1 mu + b2, and the sum of w is
positive for the larger root, mu = (b1 + sqrt(b1^2 - a (b2 - k^2))) / a. Every candidate is clamped to the simplex,
the lowest F is kept. F has a kink at g_w = 0: MGDA's w, the shortest g_w, is one candidate more.

Deliberate deviations:
- where g_w vanishes (||g_w||^2 <= rank_eps (sum_i w_i ||g_i||)^2) d is g_0. TorchJD makes it 0: one domain without
  a gradient would then stop the part;
- the update is divided by 1 + c, so that equal gradients g give g, as with every rule here. The authors' code offers
  that beside 1 + c^2, its default; the paper and TorchJD do not divide (`rescale=False`): (1 + c) g.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from gsdg.errors import UserError
from gsdg.surgery.rules import small
from gsdg.surgery.rules.base import Weighting
from gsdg.surgery.rules.mgda import shortest
from gsdg.surgery.rules.precision import rank_eps


class CAGrad(Weighting):
    """The best worst domain within c ||g_0|| of the mean gradient g_0. Up to 8 domains.

    c: how far from the mean gradient, relative to its length; 0 is the mean gradient. rescale: divide by 1 + c.
    """

    def __init__(self, *, c: float = 0.5, rescale: bool = True) -> None:
        if isinstance(c, bool) or not isinstance(c, Real) or not 0 <= c < math.inf:
            raise UserError(f"c is {c!r}; it is a distance relative to the mean gradient's length, a number >= 0")
        self.c, self.rescale = c, rescale

    def start_step(self, n_domains: int) -> None:
        small.refuse_many("CAGrad", n_domains)

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        w = small.in_pieces(lambda M: self._weights(M, rank_eps(gram_eps)), small.normalised(M))
        return w / (1 + self.c) if self.rescale else w

    def _weights(self, M: Tensor, rank: float) -> Tensor:
        inner = M.mean(1)  # <g_i, g_0> [D, K]
        radius = self.c * inner.mean(0).clamp_min(0).sqrt()  # c ||g_0|| [K]
        w = torch.cat((_stationary(M, inner, radius, rank), shortest(M, rank)[:, None]), dim=1)  # [D, S, K]
        values = (w * inner[:, None]).sum(0) + radius * _length(M, w)
        w = small.best(w, values)
        length = _length(M, w[:, None])  # [1, K]
        moves = small.exceeds_rounding(length.square(), w[:, None], M, rank)
        return 1 / len(M) + torch.where(moves, radius / length, 0.0) * w


def _length(M: Tensor, w: Tensor) -> Tensor:
    """w [D, S, K] -> ||g_w|| [S, K]."""
    return small.quadratic(M[:, :, None], w).clamp_min(0).sqrt()


def _stationary(M: Tensor, inner: Tensor, radius: Tensor, rank: float) -> Tensor:
    """Of every subset: the stationary point of F on its affine hull, clamped to the simplex, [D, S, K]."""
    mask = small.subsets(len(M), M.device)[:, 1:]  # [D, S, 1]
    inner = torch.where(mask, inner[:, None], 0.0)  # [D, S, K]
    right = torch.stack((mask.to(M.dtype).expand_as(inner), inner), dim=2)  # [D, S, 2, K]
    A, B = small.solve(small.within(mask, M[:, :, None])[:, :, :, None], right, rank).unbind(2)
    a, b1, b2 = A.sum(0), B.sum(0), (B * inner).sum(0)  # [S, K]
    root = (b1.square() - a * (b2 - radius.square())).clamp_min(0).sqrt()
    w = torch.where(a > 0, (b1 + root) / a * A - B, 0.0).clamp_min(0)
    total = w.sum(0)
    return torch.where(total > 0, w / total, mask / mask.sum(0))
