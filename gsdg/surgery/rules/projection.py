"""The projections of CorGrad and PCGrad, g_i -= <g_i, g_p> / ||g_p||^2 g_p if <g_i, g_p> < 0, on coefficients.

In the basis of the original gradients, the gradient of domain i is the row C_i, and <g_i, g_p> = C_i M C_p^T. Two
guards keep rounding errors out. Both are deliberate deviations from implementations that test the sign only:
- No gradient is projected on a g_p that earlier projections reduced to ||g_p||^2 <= rank_eps ||original g_p||^2:
  dividing by such a residue gives NaN or noise.
- <g_i, g_p> counts as negative only below -gram_eps ||g_i|| ||g_p||: after a projection the inner product is 0 up to
  rounding, plus or minus 1e-17.
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
    """Project g_i off g_p for every pair (i, p), in this order.

    Args:
        M: [D, D, K], the Gram matrices of the parts.
        on_original: whether to project on the original g_p, or on g_p after its own earlier projections.
    Returns: the coefficients C [D, D, K], and the metrics: conflict_rate, conflicts / comparisons; removed_norm_ratio,
        ||removed component|| / ||g_i before||, the mean over the conflicts.
    """
    K = M.shape[2]
    originals = initial_rows(M)
    rows = list(originals)
    squares = M.diagonal().t()  # [D, K]
    lengths = squares.sqrt()
    conflicts, removed = M.new_zeros(K), M.new_zeros(K)
    for i, p in pairs:
        onto = (originals if on_original else rows)[p]
        product, square = inner(rows[i], onto), inner(onto, onto)
        conflict = (product < -gram_eps * lengths[i] * lengths[p]) & (square > rank_eps(gram_eps) * squares[p])
        # the maximum keeps the ratio at most 1 (Cauchy-Schwarz) despite rounding
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


def initial_rows(M: Tensor) -> list[Tensor]:
    """C_i = e_i and C_i M, stacked, for each domain i: D tensors [2, D, K]. With both, an inner product is one sum."""
    D, _, K = M.shape
    eye = torch.eye(D, dtype=M.dtype, device=M.device).unsqueeze(-1).expand(D, D, K)
    return list(torch.stack((eye, M), dim=1).unbind(0))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<g_a, g_b> [K] from two rows [2, D, K], as C_a M C_b^T."""
    return (a[1] * b[0]).sum(0)


def random_pairs(n_domains: int) -> list[tuple[int, int]]:
    """Each domain i with all other domains p, in a random order drawn per domain (from torch's CPU generator)."""
    return [(i, p) for i in range(n_domains) for p in torch.randperm(n_domains).tolist() if p != i]
