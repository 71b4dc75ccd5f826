"""UPGrad: Jacobian descent for multi-objective optimisation (Quinton and Rey, arXiv 2406.16232).

Every domain gradient is projected onto the vectors that conflict with no domain. The update of a part is the mean of
the projections: w = sum_i argmin v^T M v subject to v >= e_i / D. It conflicts with no domain, and it is linear in the
length of each gradient. Solvers, exactness and deliberate deviations from TorchJD: see `dualproj.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.surgery.rules import _batched_linalg
from gsdg.surgery.rules.base import Weighting
from gsdg.surgery.rules.dualproj import project_on_dual_cone
from gsdg.surgery.rules.precision import rank_eps


class UPGrad(Weighting):
    """UPGrad: the mean of the gradients, each projected onto the cone of vectors that conflict with no domain."""

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        u = torch.eye(len(M), dtype=M.dtype, device=M.device) / len(M)
        return _batched_linalg.map_parts(
            lambda M: project_on_dual_cone(M, u, rank_eps(gram_eps)).sum(1),
            _batched_linalg.normalised(M),
            vectors=len(M),
        )
