"""DualProj: the mean gradient, projected on what conflicts with no domain. GEM's projection (Lopez-Paz and Ranzato,
NeurIPS 2017, arXiv 1706.08840), in the form and under the name of Quinton and Rey (arXiv 2406.16232).

The update of a part is the point closest to the mean gradient among the d with <d, g_i> >= 0 for all i. It is J^T v
with v = argmin v^T M v subject to v >= u, u_i = 1 / D, where the rows of J are the gradients and M = J J^T.

Exact, by trying every subset F of the domains: v = u outside F, M_FF v_F = -M_FA u_A inside (A is what lies outside).
Every candidate is clamped to v >= u, the one of the smallest v^T M v is kept. Some F with an invertible M_FF holds the
answer. v need not be unique, J^T v is.

Deliberate deviations:
- TorchJD adds 1e-4 to the diagonal of M / trace, and takes M for 0 where its trace is below 1e-4; neither here;
- what a gradient does not share with others of F counts as 0 below sqrt(rank_eps) of its length: weights stay below
  some max_weight where gradients are opposite but for rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.surgery.rules import small
from gsdg.surgery.rules.base import Weighting
from gsdg.surgery.rules.precision import rank_eps


class DualProj(Weighting):
    """The mean gradient, projected on the cone that conflicts with no domain. Up to 8 domains."""

    def start_step(self, n_domains: int) -> None:
        small.refuse_many("DualProj", n_domains)

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        u = torch.full((len(M), 1), 1 / len(M), dtype=M.dtype, device=M.device)
        return small.in_pieces(lambda M: project(M, u, rank_eps(gram_eps)).squeeze(1), small.normalised(M))


def project(M: Tensor, u: Tensor, rank: float) -> Tensor:
    """M [D, D, K] of trace 1, m columns u [D, m] >= 0 -> [D, m, K]: for each, argmin v^T M v subject to v >= u."""
    free = small.subsets(len(M), M.device)[:, :, None]  # [D, S, 1, 1]
    u, M = u[:, None, :, None], M[:, :, None, None]  # [D, 1, m, 1] and [D, D, 1, 1, K]
    pull = small.times(M, torch.where(free, 0.0, u))  # [D, S, m, K]
    v = small.solve(small.within(free, M), torch.where(free, -pull, 0.0), rank)
    v = torch.where(free, v, u).maximum(u)
    return small.best(v, small.quadratic(M, v))
