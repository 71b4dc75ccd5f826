"""Base classes of rules. A rule combines the D domain gradients of each part into one update.

There are two kinds: a `GramRule` computes coefficients from the Gram matrices of the parts; an `ElementRule` combines
the gradients element by element.

The K parts are the last dimension of every tensor here, so that sums over the few domains are vectorised over the many
parts. A rule must not read a value on the host (`.item()`, `if` on a tensor, indexing with a boolean mask), because
that would wait for the device: use torch.where instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from numbers import Real
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from gsdg.utils.errors import refuse_renamed

Metrics = dict[str, Tensor]
Reduction = Literal["sum", "mean"]


@runtime_checkable
class Rule(Protocol):
    """What a surgery asks of a rule of either kind. `RuleDefaults` has all of it.

    A rule that is no subclass of `ElementRule` is used as a Gram rule: it also needs `GramRule.coefficients`.
    Constructors take keyword-only hyper-parameters and check them.

    Attributes:
        reduction: whether the update is the sum or the mean of the domain gradients where no two domains conflict, and
            in tensors that the rule does not operate on.
        per_part_state: whether the rule keeps state per part. Such a rule cannot work at the granularity `element`.
    """

    reduction: Reduction
    per_part_state: bool

    def start_step(self, n_domains: int) -> None:
        """Called first in every step. Draw here what all parts share, and raise UserError for an invalid n_domains."""

    def state_dict(self) -> dict[str, Tensor]:
        """The state that a checkpoint must hold; {} for a stateless rule."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the state that `state_dict` returned."""


class RuleDefaults:
    """A rule without state, whose update is a mean. See `Rule` for the attributes and methods."""

    reduction: Reduction = "mean"
    per_part_state: bool = False

    def start_step(self, n_domains: int) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


class GramRule(RuleDefaults, ABC):
    """A rule that needs only the Gram matrices of the parts.

    It returns coefficients C: domain i's modified gradient of part k is sum_j C[i, j, k] g_j. The update of part k is
    the sum of the modified gradients.
    """

    @abstractmethod
    def coefficients(self, M: Tensor, gram_eps: float) -> tuple[Tensor, Metrics]:
        """Compute the coefficients C [D, D, K] float64, and the 0-dim metrics to record.

        Args:
            M: [D, D, K] float64, the Gram matrices: M[i, j, k] = <g_i, g_j> in part k.
            gram_eps: the error bound of M, |error of M[i, j, k]| <= gram_eps |g_i| |g_j|: 1e-6 for float32 gradients,
                1e-12 for float64. `precision.py` derives from it which gradients count as linearly dependent, and how
                large a weight may become.
        """


class Weighting(GramRule):
    """A Gram rule that only assigns weights to domains: domain i's modified gradient is w_i g_i."""

    @abstractmethod
    def weights(self, M: Tensor, gram_eps: float) -> Tensor:
        """The weights w [D, K] float64 for M [D, D, K] float64: the update of part k is sum_i w[i, k] g_i."""

    def coefficients(self, M: Tensor, gram_eps: float) -> tuple[Tensor, Metrics]:
        return torch.diag_embed(self.weights(M, gram_eps).t(), dim1=0, dim2=1), conflicts(M, gram_eps)


class ElementRule(RuleDefaults, ABC):
    """A rule that combines the domain gradients element by element; for the partition `element` only.

    Attributes:
        needs_first_pass: whether `first_pass` must see all gradients of a step before `combine` is called.
    """

    needs_first_pass = False

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        refuse_renamed(cls, vars(cls), {"looks_first": "needs_first_pass", "look": "first_pass"})

    def first_pass(self, rows: Tensor) -> None:
        """Read one piece of the domain gradients, rows [D, n], for statistics over the whole model."""

    @abstractmethod
    def combine(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Combine n adjacent elements of one parameter tensor.

        Args:
            rows: [D, n], the domain gradients.
        Returns: the update [n], and a mask [n] in [0, 1] or None. If there is a mask, the caller divides the update of
            the tensor by the mean of its mask (plus 1e-10), as DomainBed does to preserve its scale.
        """


def is_number(value: object) -> bool:
    """Whether a hyper-parameter is a real number; a bool is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def conflicts(M: Tensor, gram_eps: float) -> Metrics:
    """The conflict metrics of Gram matrices M [D, D, K], before any projection.

    conflict_rate: the share of pairs of domains with a cosine below -gram_eps. removed_norm_ratio: the mean of |cosine|
    over those pairs, which is the share of ||g_i|| that one projection would remove.
    """
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
