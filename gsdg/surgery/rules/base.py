"""What a rule is: Gram matrices of the parts -> coefficients, or D rows of elements -> one.

K parts come last in every tensor here: sums over the few domains are then vectorised over the many parts. No rule
may look at a value on the host (`.item()`, `if` on a tensor, boolean-mask indexing): torch.where in place of if.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
Reduction = Literal["sum", "mean"]


class Rule:
    """Base of both kinds. A subclass takes keyword-only hyper-parameters and checks them at once."""

    reduction: Reduction = "mean"  # of the domains where no two disagree, and in layers that are not operated on
    per_part_state = False  # whether it remembers something for every part: impossible for single elements

    def start_step(self, n_domains: int) -> None:
        """Once a step, before anything else: the place for what is drawn once for all parts, and for refusals of D."""

    def state_dict(self) -> dict[str, Tensor]:
        """What must survive a restart; {} for a rule without memory."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


class GramRule(Rule, ABC):
    """Gram matrices [D, D, K] -> coefficients [D, D, K]: row i is domain i's modified gradient in
    terms of the originals.

    The update of part k is sum_i sum_j C[i, j, k] g_j.
    """

    @abstractmethod
    def coefficients(self, M: Tensor, gram_eps: float) -> tuple[Tensor, Metrics]:
        """M [D, D, K] float64, M[i, j, k] = <g_i, g_j> in part k -> C [D, D, K] float64 and 0-dim metrics to record.

        gram_eps: how exact M is, |error of M[i, j, k]| <= gram_eps |g_i| |g_j|: 1e-6 for float32 gradients, 1e-12 for
        float64. `precision.py` makes of it what counts as linearly dependent, and how large a weight may grow.
        """


class Weighting(GramRule):
    """A Gram rule that only weights the domains: domain i's modified gradient is w_i g_i."""

    @abstractmethod
    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        """M [D, D, K] float64 -> w [D, K] float64: the update of part k is sum_i w[i, k] g_i."""

    def coefficients(self, M: Tensor, gram_eps: float) -> tuple[Tensor, Metrics]:
        return torch.diag_embed(self.weights(M, gram_eps).t(), dim1=0, dim2=1), conflicts(M, gram_eps)


class ElementRule(Rule, ABC):
    """A rule on single elements, for the partition `element` only."""

    looks_first = False  # whether `look` must see every piece of the step before `combine` sees the first

    def look(self, rows: Tensor) -> None:
        """rows [D, n]: a piece of the gradients, for what the update needs to know of all of them."""

    @abstractmethod
    def combine(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """rows [D, n], n neighbouring elements of one parameter tensor -> (their update [n], mask [n] or None).

        Where masks in [0, 1] are given, the tensor's update is divided by the mean of its mask (plus 1e-10), as
        DomainBed does to keep its size.
        """


def conflicts(M: Tensor, gram_eps: float) -> Metrics:
    """M [D, D, K] -> conflict_rate, the share of pairs with a cosine below -gram_eps, and removed_norm_ratio, the mean
    of ||what one projection would remove|| / ||g_i||, that is |cosine|, over those pairs."""
    D, _, K = M.shape
    lengths = M.diagonal().clamp_min(0).sqrt().t()  # [D, K]
    scale = lengths[:, None] * lengths  # [D, D, K]
    conflict = M + gram_eps * scale < 0
    cosine = torch.where(conflict, M / scale, 0.0).clamp_min(-1)
    total = conflict.sum().to(M.dtype)
    return {
        "conflict_rate": total / max(1, K * D * (D - 1)),
        "removed_norm_ratio": -cosine.sum() / total.clamp_min(1),
    }
