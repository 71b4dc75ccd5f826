"""Nash-MTL: multi-task learning as a bargaining game (Navon et al., ICML 2022, arXiv 2202.01017).

M is first divided by its Frobenius norm. The update of a part is sum_i a_i g_i with a > 0 and a_i <g_i, update> = 1
for all i, which is the minimum of a^T M a / 2 - sum_i log a_i. The update improves every domain. The lengths of the
gradients determine only the length of the update: a_i = b_i / ||g_i|| up to a common factor, where b is the solution
for the cosines. For D equal gradients a = 1: the update is their sum.

Solved by Newton's method on b s = 1, s = Q b, starting at b = s = 1. A step goes at most 0.9 of the way to the boundary
of b, s > 0. The number of steps is always 24: on random, degenerate and badly scaled matrices of 2 to 8 domains, 16
steps reached rounding error with r = 1e-6, and 24 steps with r = 1e-12.

Deliberate deviations from the authors' code, which TorchJD follows:
- The solution is exact. The authors solve up to 20 linearised convex programs until the residual is below 1e-3.
- The weights are computed at every step, not kept for several steps, and the update is not clipped to a norm of 1.
- Q = (1 - r) C + r I with r = max_weight^-2, where C are the cosines divided by their Frobenius norm. Without r no
  solution b exists if the convex hull of the gradients contains 0. With r, the weights of the domains that cannot all
  improve grow to at most sqrt(D) max_weight and cancel: the update changes none of these domains by more than about
  1 / max_weight, and is 0 up to that if they are all domains. If C has an eigenvalue l, the error of the update is
  about r / l: 1e-3 for float32 gradients with a cosine of -0.999.
- A domain without a gradient has the weight 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.surgery.rules import _batched_linalg
from gsdg.surgery.rules.base import Weighting
from gsdg.surgery.rules.precision import max_weight

STEPS = 24  # Newton steps
REACH = 0.9  # the largest step, as a share of the way to the boundary


class NashMTL(Weighting):
    """Nash-MTL: the update with a_i <g_i, update> = 1 for every domain, the Nash bargaining solution. A sum rule."""

    reduction = "sum"

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        M = _batched_linalg.normalised(M)
        cosines, inverse = _batched_linalg.cosines(M)
        regularised = max_weight(gram_eps) ** -2
        eye = torch.eye(len(M), dtype=M.dtype, device=M.device).unsqueeze(-1)
        size = _frobenius(cosines)
        Q = (1 - regularised) * cosines / torch.where(size > 0, size, 1.0) + regularised * eye
        factor = torch.where(size > 0, (_frobenius(M) / size).sqrt(), 0.0)
        return factor * inverse * _bargain(Q, eye)


def _frobenius(M: Tensor) -> Tensor:
    return M.square().sum((0, 1)).sqrt()


def _bargain(Q: Tensor, eye: Tensor) -> Tensor:
    """The b [D, K] > 0 with b (Q b) = 1, for positive definite Q [D, D, K]."""
    b = s = Q.new_ones(Q.shape[1:])
    for _ in range(STEPS):
        gap = s - _batched_linalg.matvec(Q, b)
        # with relative steps (b z for b, s t for s) the linear system is symmetric
        system = b[:, None] * Q * b + eye * (b * s)
        z = _batched_linalg.solve(system, 1 - b * s + b * gap, 0.0)
        t = (_batched_linalg.matvec(Q, b * z) - gap) / s
        step = REACH / torch.maximum(-z, -t).amax(0).clamp_min(REACH)
        b, s = b * (1 + step * z), s * (1 + step * t)
    return b
