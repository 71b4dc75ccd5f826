"""CAGrad: conflict-averse gradient descent (Liu et al., NeurIPS 2021, arXiv 2110.14048).

Let g_0 be the mean gradient of a part. Its update is the d that maximises min_i <g_i, d> subject to
||d - g_0|| <= c ||g_0||. The solution is d = g_0 + c ||g_0|| g_w / ||g_w|| with g_w = sum_i w_i g_i, where w minimises
F(w) = <g_w, g_0> + c ||g_0|| ||g_w|| over the simplex. The weights of the domains are b + (c ||g_0|| / ||g_w||) w,
b = 1 / D.

Up to 8 domains the minimum is exact, by trying every subset S of the domains. Let k = c ||g_0||. A vector of the affine
hull of S is p - x, where p is the shortest one and x is in the span of the differences of S, to which p is orthogonal.
Let q be the projection of g_0 on that span. Then F = <p, g_0> - <x, q> + k sqrt(||p||^2 + ||x||^2) is stationary at x =
q ||p|| / sqrt(k^2 - ||q||^2), if ||q|| < k; otherwise it has no minimum there. p and q are as precise as the
differences of the gradients, also where two gradients are nearly opposite and p is nearly 0. Every candidate is clamped
to the simplex, and the candidate with the lowest F is kept. F is not differentiable at g_w = 0; therefore the shortest
vectors p, one of which is MGDA's, are candidates too.

For more domains F is minimised by the active-set method of `_active_set.py`, which goes to the stationary point of one
subset after the other; a domain gains where <g_i, d> < F. F is differentiable wherever it goes: let x >= 0 give the
projection g_0 + g_x of g_0 on the dual cone (`dualproj.py`). If ||g_x|| > k, then F(x) < 0, which is where it starts,
and F never rises to 0 = F(g_w = 0). Otherwise F >= 0: it starts at the best single domain, and if it comes to g_w = 0
that is optimal. For M of trace
1 the gap F(w) - min_i <g_i, d> and the error of ||d - g_0|| are at most 1e-7; beside two nearly opposite gradients
(cosine -1 + 1e-8) the latter is at most 1e-5, measured 1.4e-6 (float64, c from 0.1 to 3, every family of
tests/surgery/families.py, D = 9, 12 and 40: tests/surgery/test_active_set.py).

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
from gsdg.surgery.rules._active_set import Tableau, minimise, nonnegative_least_squares
from gsdg.surgery.rules.base import Weighting, is_number
from gsdg.surgery.rules.mgda import affine_hulls, on_simplex
from gsdg.surgery.rules.precision import rank_eps
from gsdg.utils.errors import UserError


class CAGrad(Weighting):
    """CAGrad: the update near the mean gradient that improves the worst domain most.

    Args:
        c: the largest distance from the mean gradient, relative to its length, >= 0; 0 is the mean gradient. The
            authors use 0.5.
        rescale: whether to divide the update by 1 + c.
    """

    def __init__(self, *, c: float = 0.5, rescale: bool = True) -> None:
        if not is_number(c) or not 0 <= c < math.inf:
            raise UserError(f"c is {c!r}; it is a distance relative to the length of the mean gradient, a number >= 0")
        self.c, self.rescale = c, rescale

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        w = _batched_linalg.map_parts(lambda M: self._weights(M, rank_eps(gram_eps)), _batched_linalg.normalised(M))
        return w / (1 + self.c) if self.rescale else w

    def _weights(self, M: Tensor, rank: float) -> Tensor:
        inner = M.mean(1)  # <g_i, g_0> [D, K]
        radius = self.c * inner.mean(0).clamp_min(0).sqrt()  # c ||g_0|| [K]
        find = _by_subsets if _batched_linalg.by_subsets(len(M)) else by_active_set
        w = find(M, inner, radius, rank)
        length = _length(M, w[:, None])  # [1, K]
        nonzero = _batched_linalg.exceeds_rounding(length.square(), w[:, None], M, rank)
        return 1 / len(M) + torch.where(nonzero, radius / length, 0.0) * w


def _by_subsets(M: Tensor, inner: Tensor, radius: Tensor, rank: float) -> Tensor:
    """The w [D, K] that minimises F, for inner [D, K] and radius [K]."""
    w = _candidates(M, inner, radius, rank)  # [D, S, K]
    values = (w * inner[:, None]).sum(0) + radius * _length(M, w)
    return _batched_linalg.lowest(w, values)


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


def by_active_set(M: Tensor, inner: Tensor, radius: Tensor, rank: float) -> Tensor:
    """As `_by_subsets`, for any number of domains; w is 0 where a gradient is 0 and F nowhere negative."""
    program = _ConeProgram(M, inner, radius, rank)
    y = minimise(program.tableau, program.start(), program.step, program.gains, rank)
    at_zero = (M.diagonal().t() == 0).any(0) & (program.value(y) >= 0)  # the gradient of length 0 is the best g_w
    return torch.where(at_zero, 0.0, y * program.inverse)


class _ConeProgram:
    """min F over y >= 0 with sum_i l_i y_i = 1: the simplex in units of the lengths, y_i = w_i |g_i|.

    l_i is the length of the shortest gradient divided by |g_i|, and 0 for gradients of length 0, which are left out. In
    these units <g_i, g_0> is h_i, and ||g_w||^2 is y^T C y with the cosines C. On the plane of the y the Gram matrices
    C and C + l l^T agree up to a constant, and the latter is regular also for two opposite gradients.

    Args:
        M: [D, D, K]. inner: [D, K]. radius: [K]. rank: rank_eps.
    """

    def __init__(self, M: Tensor, inner: Tensor, radius: Tensor, rank: float) -> None:
        self.C, self.inverse = _batched_linalg.cosines(M)
        self.h, self.radius, self.rank = inner * self.inverse, radius, rank
        lengths = M.diagonal().t().sqrt()
        self.size = lengths.mean(0) + radius  # [K], the terms of <g_i / |g_i|, d>
        shortest = torch.where(lengths > 0, lengths, torch.inf).amin(0)
        tiny = torch.finfo(M.dtype).tiny ** 0.25  # so that no square overflows
        self.l = torch.where(lengths > 0, (shortest * self.inverse).clamp_min(tiny), 0.0)
        A, b = self.C + self.l[:, None] * self.l, torch.stack((self.l, self.h), dim=1)
        self.tableau = Tableau(A, b)

    def value(self, y: Tensor) -> Tensor:
        """F, [K]."""
        return (self.h * y).sum(0) + self.radius * self._length(y)

    def start(self) -> Tensor:
        """The y at which the method starts, whose unknowns become the used ones."""
        residual = nonnegative_least_squares(
            self.C, -self.h, self.size, self.rank
        )  # of the projection on the dual cone
        single = torch.where(self.l > 0, (self.h + self.radius) / self.l, torch.inf).argmin(0)
        best = torch.arange(len(self.h), device=single.device)[:, None] == single
        y = torch.where(self._length(residual) > self.radius, residual, best.to(residual.dtype))
        self.tableau.use(y > 0, self.rank)
        y = torch.where(self.tableau.used, y, 0.0)
        total = (self.l * y).sum(0)
        return y / torch.where(total > 0, total, 1.0)

    def step(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """From y to the stationary point p - ||p|| / sqrt(k^2 - ||q||^2) q; along -q without limit if there is none."""
        solutions = torch.where(self.tableau.used[:, None], self.tableau.solutions, 0.0)
        to_l, to_h = solutions.unbind(1)
        square = (self.l * to_l).sum(0)
        p = to_l / torch.where(square > 0, square, 1.0)
        q = to_h - (self.l * to_h).sum(0) * p
        slack = self.radius.square() - (q * self.h).sum(0)  # k^2 - ||q||^2
        positive = slack > torch.finfo(slack.dtype).tiny ** 0.5
        ratio = torch.where(positive, self._length(p) / slack.clamp_min(0).sqrt(), 0.0)
        return torch.where(positive, p - ratio * q - y, -q), torch.where(positive, 1.0, torch.inf)

    def gains(self, y: Tensor) -> Tensor:
        """F - <g_i, d> in units of the lengths, squared and divided by the pivot; 0 if it is a rounding error.

        0 also where g_w vanishes up to rounding, which is optimal: its direction would be noise.
        """
        length, total = self._length(y), y.sum(0)
        eps = torch.finfo(y.dtype).eps
        vanishes = length.square() <= 16 * eps * total.square()
        factor = torch.where(vanishes, torch.inf, self.radius / length)
        excess = self.value(y) * self.l - self.h - factor * _batched_linalg.matvec(self.C, y)
        terms = self.size * (1 + self.l * total) + factor * total
        return torch.where(excess > 16 * eps * terms, excess.square() / self.tableau.pivots, 0.0)

    def _length(self, y: Tensor) -> Tensor:
        return _batched_linalg.quadratic(self.C, y).clamp_min(0).sqrt()
