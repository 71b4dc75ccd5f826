"""UPGrad: Jacobian descent for multi-objective optimisation (Quinton and Rey, arXiv 2406.16232).

Every domain's gradient is projected on what conflicts with no domain, and the update of a part is the mean of the
projections: w = sum_i argmin v^T M v subject to v >= e_i / D. It conflicts with no domain, and it is linear in each
gradient's length. Solver, exactness and deliberate deviations from TorchJD are DualProj's: see there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.surgery.rules import small
from gsdg.surgery.rules.base import Weighting
from gsdg.surgery.rules.dualproj import project
from gsdg.surgery.rules.precision import rank_eps


class UPGrad(Weighting):
    """The mean of the gradients, each projected on the cone that conflicts with no domain. Up to 8 domains."""

    def start_step(self, n_domains: int) -> None:
        small.refuse_many("UPGrad", n_domains)

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        u = torch.eye(len(M), dtype=M.dtype, device=M.device) / len(M)
        return small.in_pieces(lambda M: project(M, u, rank_eps(gram_eps)).sum(1), small.normalised(M), vectors=len(M))
