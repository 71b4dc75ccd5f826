"""What CorGrad and PCGrad share: g_i -= <g_i, g_p> / ||g_p||^2 g_p wherever <g_i, g_p> < 0, in terms of coefficients.

In the basis of the original gradients domain i's gradient is C_i, and <g_i, g_p> = C_i M C_p^T. Rounding
errors are kept out, both deliberate deviations from every implementation that acts on the bare sign:
- nothing is projected on a g_p that the projections before have made vanish, ||g_p||^2 <= rank_eps ||original g_p||^2:
  dividing by that residue gives NaN or noise;
- <g_i, g_p> counts as negative below -gram_eps ||g_i|| ||g_p||: a pair just made orthogonal comes out at
  plus or minus 1e-17.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsdg.surgery.rules.base import Metrics
from gsdg.surgery.rules.precision import rank_eps


def project(
    M: Tensor, pairs: Sequence[tuple[int, int]], *, on_original: bool, gram_eps: float
) -> tuple[Tensor, Metrics]:
    """M [D, D, K], the pairs (i, p) in the order of their projections -> C [D, D, K] and the metrics of a rule.

    conflict_rate: conflicts / comparisons. removed_norm_ratio: ||removed|| / ||g_i before||, mean over conflicts.
    """
    K = M.shape[2]
    originals = rows_of(M)
    rows = list(originals)
    squares = M.diagonal().t()  # [D, K]
    lengths = squares.sqrt()
    conflicts, removed = M.new_zeros(K), M.new_zeros(K)
    for i, p in pairs:
        onto = (originals if on_original else rows)[p]
        product, square = inner(rows[i], onto), inner(onto, onto)
        conflict = (product < -gram_eps * lengths[i] * lengths[p]) & (square > rank_eps(gram_eps) * squares[p])
        # the maximum bounds the ratio by 1 (Cauchy-Schwarz) where rounding would not
        ratio = -product / torch.maximum(square * inner(rows[i], rows[i]), product * product).sqrt()
        removed += torch.where(conflict, ratio, 0.0)
        conflicts += conflict
        rows[i] = rows[i] - torch.where(conflict, product / square, 0.0) * onto
    total = conflicts.sum()
    metrics = {
        "conflict_rate": total / max(1, K * len(pairs)),
        "removed_norm_ratio": removed.sum() / total.clamp_min(1),
    }
    return torch.stack([row[0] for row in rows]), metrics


def rows_of(M: Tensor) -> list[Tensor]:
    """M [D, D, K] -> D rows [2, D, K], C_i = e_i and C_i M: with both at hand an inner product is one sum over D."""
    D, _, K = M.shape
    eye = torch.eye(D, dtype=M.dtype, device=M.device).unsqueeze(-1).expand(D, D, K)
    return list(torch.stack((eye, M), dim=1).unbind(0))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<g_a, g_b> [K] from two rows [2, D, K]: C_b against C_a M."""
    return (a[1] * b[0]).sum(0)


def drawn_pairs(n_domains: int) -> list[tuple[int, int]]:
    """Every domain in turn, against the others in an order of its own (torch's CPU generator)."""
    return [(i, p) for i in range(n_domains) for p in torch.randperm(n_domains).tolist() if p != i]
