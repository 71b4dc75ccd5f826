"""Convex programs over x >= 0, one per part, by a primal active-set method: for rules with more than 8 domains.

The method is that of Lawson and Hanson ("Solving Least Squares Problems", 1974, chapter 23) on Gram matrices. Let the
used unknowns be those that may be above 0. Every round goes from x towards the minimum over the used unknowns, as far
as x >= 0 allows. If an unknown reaches 0 on the way, it is no longer used; otherwise x is that minimum, and the unused
unknown with the largest gain becomes used. If no unknown gains, x is optimal, and further rounds change nothing. The
objective never rises, so that x is feasible and good even if the rounds do not suffice.

Every round adds or removes one unknown, which is one exchange step in a `Tableau`: D^2 operations per part, all of them
elementwise over the parts, and nothing is read on the host. The number of rounds is therefore fixed: ROUNDS times D.
On the
families of tests/surgery/families.py (20 to 200 elements, float32 and float64, up to 64 domains; CAGrad up to 30) the
last part was optimal after at most 1.7 D rounds, and beside two nearly opposite gradients after 2.2 D.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDS = 3  # per domain


class Tableau:
    """The systems A_SS x_S = b_S of a set S of used unknowns that changes by one unknown at a time.

    For used unknowns i, `solutions[i]` is x_i; for the others it is the residual b_i - A_iS x_S. `pivots[i]` is, for an
    unused i, the squared distance of i from the span of the used ones: 0 if it depends on them.

    Args:
        A: [D, D, K], symmetric positive semi-definite, with diagonal entries between 1 and 2, or 0.
        b: [D, R, K], R right-hand sides.
    """

    def __init__(self, A: Tensor, b: Tensor) -> None:
        self._table = torch.cat((A, b), dim=1)  # [D, D + R, K]
        self.used = torch.zeros_like(A[0], dtype=torch.bool)  # [D, K]

    @property
    def solutions(self) -> Tensor:
        """[D, R, K]"""
        return self._table[:, len(self._table) :]

    @property
    def pivots(self) -> Tensor:
        """[D, K]"""
        return self._table.diagonal(dim1=0, dim2=1).t()

    def use(self, mask: Tensor, rank: float) -> None:
        """Use the unknowns of mask [D, K], except those that depend on the ones before them up to `rank`."""
        for i in range(len(mask)):
            index = torch.full_like(mask[:1], i, dtype=torch.int64)
            self.exchange(index, mask[i : i + 1] & (self.pivots[i : i + 1] > rank))

    def exchange(self, index: Tensor, active: Tensor) -> None:
        """Use the unknown index [1, K], or no longer use it if it is used, in the parts where active [1, K] is True."""
        D = len(self._table)
        used = self.used.gather(0, index)
        row = self._row(index)
        pivot = row.gather(0, index)
        inverse = torch.where(active, 1 / pivot, 0.0)
        self._table.addcmul_(row[:D, None], row * inverse, value=-1)
        # The row and the column of the unknown itself are written, not updated: nothing cancels.
        new = torch.where(active, torch.where(used, -1.0, 1.0) * inverse * row, row)
        new = new.scatter(0, index, torch.where(active, -inverse, pivot))
        self._table.scatter_(0, index[:, None].expand(1, *row.shape), new[None])
        self._table.scatter_(1, index[:, None].expand(D, 1, -1), new[:D, None])
        self.used = self.used.scatter(0, index, used ^ active)

    def _row(self, index: Tensor) -> Tensor:
        """Row index [1, K] of each part, [D + R, K]; its first D entries are also the column, by symmetry."""
        return self._table.gather(0, index[:, None].expand(1, self._table.shape[1], -1)).squeeze(0)


def minimise(
    tableau: Tableau,
    x: Tensor,
    step: Callable[[Tensor], tuple[Tensor, Tensor]],
    gains: Callable[[Tensor], Tensor],
    rank: float,
) -> Tensor:
    """The x [D, K] >= 0 with the lowest objective, from a feasible x that is 0 outside `tableau.used`.

    Args:
        step: x -> the direction [D, K] to the minimum over the used unknowns, and how often it may be taken at most,
            [K]: once, or without limit if the objective falls forever.
        gains: x -> [D, K], above 0 where the objective falls if the unknown becomes used.
        rank: rank_eps. An unknown that depends on the used ones up to rank_eps does not become used.
    """
    for _ in range(ROUNDS * len(x)):
        x, blocked, leaving = _advanced(x, *step(x), tableau.used)
        can_enter = ~tableau.used & (tableau.pivots > rank)
        gain, entering = torch.where(can_enter, gains(x), 0.0).max(0, keepdim=True)
        tableau.exchange(torch.where(blocked, leaving, entering), blocked | (gain > 0))
    return _advanced(x, *step(x), tableau.used)[0]


def _advanced(x: Tensor, direction: Tensor, limit: Tensor, used: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, moved along the direction until an unknown is 0; whether one is [1, K], and which one [1, K]."""
    falling = used & (direction < 0)
    ratios = torch.where(falling, x / torch.where(falling, -direction, 1.0), torch.inf)
    nearest, leaving = ratios.min(0, keepdim=True)
    length = torch.minimum(nearest, limit)
    moved = x + torch.where(length < torch.inf, length, 0.0) * direction
    return torch.where(used, moved, 0.0).clamp_min(0), (nearest <= limit) & (length < torch.inf), leaving


def nonnegative_least_squares(A: Tensor, b: Tensor, size: Tensor, rank: float) -> Tensor:
    """argmin x^T A x / 2 - b^T x over x >= 0: [D, K].

    Args:
        A: [D, D, K], as for `Tableau`. b: [D, K].
        size: [K], the magnitude of the terms that b_i is a sum of: their rounding errors are no gains.
        rank: rank_eps.
    """
    tableau, once = Tableau(A, b[:, None]), torch.ones_like(size)
    rounding = 16 * torch.finfo(A.dtype).eps

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        return tableau.solutions[:, 0] - x, once

    def gains(x: Tensor) -> Tensor:
        residual = tableau.solutions[:, 0]
        return torch.where(residual > rounding * (size + x.sum(0)), residual.square() / tableau.pivots, 0.0)

    return minimise(tableau, torch.zeros_like(b), step, gains, rank)
