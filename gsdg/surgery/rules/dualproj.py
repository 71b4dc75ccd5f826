"""DualProj: the mean gradient, projected onto the vectors that conflict with no domain. The projection of GEM
(Lopez-Paz and Ranzato, NeurIPS 2017, arXiv 1706.08840), in the form and under the name of Quinton and Rey
(arXiv 2406.16232).

The update of a part is the vector closest to the mean gradient among all d with <d, g_i> >= 0 for all i. It is J^T v
with v = argmin v^T M v subject to v >= u, u_i = 1 / D, where the rows of J are the domain gradients and M = J J^T.

Up to 8 domains the minimum is exact, by trying every subset F of the domains: v = u outside of F, and M_FF v_F = -M_FA
u_A inside, where A is the complement of F. Every candidate is clamped to v >= u, and the candidate with the smallest
v^T M v is kept. Some F with an invertible M_FF gives the minimum. v need not be unique; J^T v is.

For more domains the active-set method of `_active_set.py` solves the same program for y = |g| (v - u) >= 0, that is
argmin ||J^T u + sum_i y_i g_i / |g_i| ||. The conditions <d, g_i> >= 0 and (v_i - u_i) <d, g_i> = 0 hold to 1e-9 of the
lengths that d is the sum of (float64, every family of tests/surgery/families.py, D = 9 to 40; mostly to 1e-13: the
worst are gradients of which two are nearly opposite, or that depend on two of them). Up to 8 domains the updates of
both methods differ by up to 1e-7: two candidates whose squared lengths differ by 1e-16 are not told apart by the
subsets. In float32, if the cone holds only 0, as for more random gradients than elements, the update is noise of up to
1e-2 of the longest gradient, not 0.

Deliberate deviations:
- TorchJD adds 1e-4 to the diagonal of M / trace, and treats M as 0 if its trace is below 1e-4. Neither is done here.
- The component of a gradient that is independent of the others in F counts as 0 below sqrt(rank_eps) of its length.
  This bounds the weights by about max_weight for gradients that are opposite up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.surgery.rules import _batched_linalg
from gsdg.surgery.rules._active_set import nonnegative_least_squares
from gsdg.surgery.rules.base import Weighting
from gsdg.surgery.rules.precision import rank_eps


class DualProj(Weighting):
    """DualProj: the mean gradient, projected onto the cone of vectors that conflict with no domain."""

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        u = torch.full((len(M), 1), 1 / len(M), dtype=M.dtype, device=M.device)
        return _batched_linalg.map_parts(
            lambda M: project_on_dual_cone(M, u, rank_eps(gram_eps)).squeeze(1), _batched_linalg.normalised(M)
        )


def project_on_dual_cone(M: Tensor, u: Tensor, rank: float) -> Tensor:
    """argmin v^T M v subject to v >= u, for every column of u: [D, m, K].

    Args:
        M: [D, D, K], Gram matrices of trace 1. u: [D, m], >= 0.
        rank: rank_eps.
    """
    return (_by_subsets if _batched_linalg.by_subsets(len(M)) else by_active_set)(M, u, rank)


def _by_subsets(M: Tensor, u: Tensor, rank: float) -> Tensor:
    free = _batched_linalg.subsets(len(M), M.device)[:, :, None]  # [D, S, 1, 1]
    u, M = u[:, None, :, None], M[:, :, None, None]  # [D, 1, m, 1] and [D, D, 1, 1, K]
    pull = _batched_linalg.matvec(M, torch.where(free, 0.0, u))  # [D, S, m, K]
    v = _batched_linalg.solve(_batched_linalg.submatrix(free, M), torch.where(free, -pull, 0.0), rank)
    v = torch.where(free, v, u).maximum(u)
    return _batched_linalg.lowest(v, _batched_linalg.quadratic(M, v))


def by_active_set(M: Tensor, u: Tensor, rank: float) -> Tensor:
    """`project_on_dual_cone` for any number of domains: m programs per part, at most ROUNDS D rounds each."""
    D, m, K = len(M), u.shape[1], M.shape[2]
    C, inverse = _batched_linalg.cosines(M)
    lengths = M.diagonal().t().sqrt()
    mean = _batched_linalg.matvec(M[:, :, None], u[:, :, None]) * inverse[:, None]  # <g_i / |g_i|, J^T u> [D, m, K]
    size = (u[:, :, None] * lengths[:, None]).sum(0)  # [m, K]
    C = C[:, :, None].expand(-1, -1, m, -1).reshape(D, D, m * K)
    y = nonnegative_least_squares(C, -mean.reshape(D, m * K), size.reshape(m * K), rank)
    return u[:, :, None] + y.view(D, m, K) * inverse[:, None]
