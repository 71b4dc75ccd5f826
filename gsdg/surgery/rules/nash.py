"""Nash-MTL: multi-task learning as a bargaining game (Navon et al., ICML 2022, arXiv 2202.01017).

The update of a part is sum_i a_i g_i with a > 0 and a_i <g_i, update> = 1 for all i, with M divided by its Frobenius
norm first. That is the minimum of a^T M a / 2 - sum_i log a_i. Every domain gains. The lengths of the gradients only
set the length of the update: a_i = b_i / ||g_i|| up to a factor, b the solution for the cosines. D equal gradients
have a = 1 each: the update is their sum.

Solved by Newton's method on b s = 1, s = Q b, from b = s = 1; a step goes at most 0.9 of the way to the edge of
b, s > 0. 24 steps, whatever the values: on random, degenerate and badly scaled matrices of 2 to 8 domains 16 reached
rounding with r = 1e-6, and 24 with 1e-12.

Deliberate deviations from the authors' code, which TorchJD follows:
- exact, in place of up to 20 linearised convex programs solved until the residual is below 1e-3;
- the weights are not kept for several steps, and the update is not clipped to a norm of 1;
- Q = (1 - r) C + r I, r = max_weight^-2, C the cosines divided by their Frobenius norm. Without it b does not exist
  where the convex hull of the gradients holds 0. Now the weights of the domains that cannot all gain grow, to at most
  sqrt(D) max_weight, until they cancel: the update moves none of them but for 1 / max_weight, and is 0 to that where
  they are all domains. Where C has an eigenvalue of l the update is off by r / l: 1e-3 for float32 gradients of cosine
  -0.999;
- a domain without a gradient has the weight 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.surgery.rules import small
from gsdg.surgery.rules.base import Weighting
from gsdg.surgery.rules.precision import max_weight

STEPS = 24
REACH = 0.9  # of the way to the edge


class NashMTL(Weighting):
    """The update from which all domains gain equally much, a sum over the domains."""

    reduction = "sum"

    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        M = small.normalised(M)
        cosines, inverse = small.cosines(M)
        regularised = max_weight(gram_eps) ** -2
        eye = torch.eye(len(M), dtype=M.dtype, device=M.device).unsqueeze(-1)
        size = _frobenius(cosines)
        Q = (1 - regularised) * cosines / torch.where(size > 0, size, 1.0) + regularised * eye
        factor = torch.where(size > 0, (_frobenius(M) / size).sqrt(), 0.0)
        return factor * inverse * _bargain(Q, eye)


def _frobenius(M: Tensor) -> Tensor:
    return M.square().sum((0, 1)).sqrt()


def _bargain(Q: Tensor, eye: Tensor) -> Tensor:
    """Q [D, D, K] positive definite -> b [D, K] > 0 with b (Q b) = 1."""
    b = s = Q.new_ones(Q.shape[1:])
    for _ in range(STEPS):
        gap = s - small.times(Q, b)
        # relative steps, b z for b and s t for s, make the system symmetric
        system = b[:, None] * Q * b + eye * (b * s)
        z = small.solve(system, 1 - b * s + b * gap, 0.0)
        t = (small.times(Q, b * z) - gap) / s
        step = REACH / torch.maximum(-z, -t).amax(0).clamp_min(REACH)
        b, s = b * (1 + step * z), s * (1 + step * t)
    return b
