"""MGDA: multi-task learning as multi-objective optimisation (Sener and Koltun, NeurIPS 2018, arXiv 1810.04650).

The update of a part is the shortest vector in the convex hull of its domain gradients: w = argmin w^T M w over the
simplex, M_ij = <g_i, g_j>. It conflicts with no domain (M w >= w^T M w), and it is 0 if the hull contains 0.

Up to 8 domains the minimum is exact, by trying every subset S of the domains. The shortest vector in the affine hull of
S is found by a linear solve in the differences g_j - g_r, where g_r is the shortest gradient of S. (Solving M_SS x = 1
would fail for a linearly dependent S whose hull contains 0, such as two opposite gradients.) Every candidate is clamped
to the simplex, and the shortest candidate is kept. By Caratheodory's theorem some affinely independent S gives the
minimum, so that subsets without a solution do no harm.

For more domains the active-set method of `_active_set.py` solves an equal program: w_i ~ y_i / |g_i|, where y >= 0
minimises ||sum_i y_i g_i / |g_i| ||^2 + (sum_i l_i y_i - 1)^2, and l_i = L / |g_i| for the shortest length L > 0. (With
t = sum_i l_i y_i, y_i is t w_i / l_i, and the terms are t^2 ||sum_i w_i g_i||^2 / L^2 and (t - 1)^2.) In float64
M w >= w^T M w holds to 1e-13 for M of trace 1 (families of tests/surgery/families.py, D = 9, 12 and 40; measured
4e-15). Up to 8 domains the updates of both methods differ by at most 7e-9, the root of the rounding error of w^T M w.

Deliberate deviations:
- The authors' code and TorchJD iterate Frank-Wolfe steps and stop early; this is the minimum to which they converge.
- Gradients are not normalised first (the authors' code offers: none, by norm, by loss).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.surgery.rules import _batched_linalg
from gsdg.surgery.rules._active_set import nonnegative_least_squares
from gsdg.surgery.rules.base import Weighting
from gsdg.surgery.rules.precision import rank_eps


class MGDA(Weighting):
    """MGDA: the shortest vector in the convex hull of the domain gradients."""

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        return _batched_linalg.map_parts(lambda M: shortest(M, rank_eps(gram_eps)), _batched_linalg.normalised(M))


def shortest(M: Tensor, rank: float) -> Tensor:
    """The w [D, K] on the simplex with the smallest w^T M w, for M [D, D, K] of trace 1; rank: rank_eps."""
    return (_by_subsets if _batched_linalg.by_subsets(len(M)) else by_active_set)(M, rank)


def _by_subsets(M: Tensor, rank: float) -> Tensor:
    w = on_simplex(affine_hulls(M, M[:, :0], rank)[0])
    return _batched_linalg.lowest(w, _batched_linalg.quadratic(M[:, :, None], w))


def by_active_set(M: Tensor, rank: float) -> Tensor:
    """`shortest` for any number of domains."""
    C, inverse = _batched_linalg.cosines(M)
    length, index = M.diagonal().t().sqrt().min(0, keepdim=True)  # of the shortest gradient [1, K]
    relative = length * inverse  # l_i
    y = nonnegative_least_squares(C + relative[:, None] * relative, relative, torch.ones_like(length[0]), rank)
    w = y * inverse
    only_shortest = torch.zeros_like(w).scatter(0, index, 1.0)  # the minimum is 0 if a gradient is 0
    return torch.where(length > 0, w / w.sum(0), only_shortest)


def on_simplex(w: Tensor) -> Tensor:
    """w [D, ...], whose entries add up to 1, clamped to the simplex."""
    w = w.clamp_min(0)
    return w / w.sum(0)  # the sum is at least 1: it was 1 before the clamp


def affine_hulls(M: Tensor, h: Tensor, rank: float) -> tuple[Tensor, Tensor]:
    """For every subset of the domains: the shortest vector in its affine hull, and projections on its differences.

    Args:
        M: [D, D, K], of trace 1.
        h: [D, R, K], the inner products of the gradients with R vectors to project.
        rank: rank_eps.

    Returns:
        The weights [D, 2^D - 1, K] of the shortest vector, which add up to 1; and the weights [D, 2^D - 1, R, K] of the
        projection of each vector on the span of the differences g_j - g_r, which add up to 0.
    """
    D, _, K = M.shape
    mask = _batched_linalg.subsets(D, M.device)[:, 1:]  # [D, S, 1]
    squares = M.diagonal().t()[:, None]  # [D, 1, K]
    root = torch.where(mask, squares, torch.inf).argmin(0, keepdim=True)  # [1, S, K]
    is_root = torch.arange(D, device=M.device)[:, None, None] == root
    others = mask & ~is_root
    square = squares.expand(D, mask.shape[1], K).gather(0, root)  # ||g_r||^2 [1, S, K]
    inner = M.gather(1, root.expand(D, -1, K))  # <g_j, g_r> [D, S, K]
    differences = M[:, :, None] - inner[:, None] - inner + square  # <g_i - g_r, g_j - g_r>
    vectors = torch.cat((inner[:, :, None], h[:, None].expand(-1, mask.shape[1], -1, -1)), dim=2)  # g_r and h
    at_root = vectors.gather(0, root[:, :, None].expand(-1, -1, vectors.shape[2], -1))
    right = torch.where(others[:, :, None], vectors - at_root, 0.0)  # the inner products of g_j - g_r
    t = _batched_linalg.solve(_batched_linalg.submatrix(others, differences)[:, :, :, None], right, rank)
    t = torch.where(is_root[:, :, None], -t.sum(0), t)
    return is_root.to(M.dtype) - t[:, :, 0], t[:, :, 1:]
