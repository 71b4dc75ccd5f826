"""MGDA: multi-task learning as multi-objective optimisation (Sener and Koltun, NeurIPS 2018, arXiv 1810.04650).

The update of a part is the shortest vector in the convex hull of its domains' gradients: w = argmin w^T M w over the
simplex, M_ij = <g_i, g_j>. It conflicts with no domain (M w >= w^T M w) and is 0 where the hull holds 0.

Exact, by trying every subset S of the domains: the shortest vector of the affine hull of S is a linear solve in the
differences g_j - g_r to its shortest gradient g_r. M_SS x = 1 would do as well but where S is linearly dependent and
its hull yet holds 0, two opposite gradients for one. Every candidate is clamped to the simplex, the shortest one is
kept. By Caratheodory some affinely independent S holds the answer, so subsets without a solution do no harm.

Deliberate deviations:
- the authors' code and TorchJD's iterate Frank-Wolfe steps and stop early; this is the minimum they tend to;
- gradients are not normalised first (the authors' code offers it: none, by norm, by loss).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.surgery.rules import small
from gsdg.surgery.rules.base import Weighting
from gsdg.surgery.rules.precision import rank_eps


class MGDA(Weighting):
    """The shortest vector in the convex hull of the gradients. Up to 8 domains."""

    def start_step(self, n_domains: int) -> None:
        small.refuse_many("MGDA", n_domains)

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        return small.in_pieces(lambda M: shortest(M, rank_eps(gram_eps)), small.normalised(M))


def shortest(M: Tensor, rank: float) -> Tensor:
    """M [D, D, K] of trace 1 -> w [D, K] on the simplex with the smallest w^T M w."""
    D, _, K = M.shape
    mask = small.subsets(D, M.device)[:, 1:]  # [D, S, 1]
    squares = M.diagonal().t()[:, None]  # [D, 1, K]
    root = torch.where(mask, squares, torch.inf).argmin(0, keepdim=True)  # [1, S, K]
    index = torch.arange(D, device=M.device)[:, None, None]
    others = mask & (index != root)
    square = squares.expand(D, mask.shape[1], K).gather(0, root)  # ||g_r||^2 [1, S, K]
    inner = M.gather(1, root.expand(D, -1, K))  # <g_j, g_r> [D, S, K]
    differences = M[:, :, None] - inner[:, None] - inner + square  # <g_i - g_r, g_j - g_r>
    rest = small.solve(small.within(others, differences), torch.where(others, square - inner, 0.0), rank)
    w = torch.where(index == root, 1 - rest.sum(0), rest).clamp_min(0)
    w = w / w.sum(0)  # at least 1: it was 1 before the clamp
    return small.best(w, small.quadratic(M[:, :, None], w))
