"""GradVac (Wang et al., "Gradient Vaccine", ICLR 2021, arXiv 2010.05874).

For every domain i, the others j in random order, phi = cos(g_i, g_j) with g_j as it was originally, t_ij its target:

    where phi < t_ij:  g_i += ||g_i|| (t sqrt(1 - phi^2) - phi sqrt(1 - t^2)) / (||g_j|| sqrt(1 - t^2)) g_j
    t_ij <- (1 - beta) t_ij + beta phi

so that afterwards cos(g_i, g_j) = t_ij; the update is the sum over the domains. Targets begin at 0, where the first
step is PCGrad's. One target a part and ordered pair of domains, in the checkpoint.

Deviations: sqrt(1 - t^2) is at least 1 / max_weight, without which nearly identical gradients divide by zero; a
gradient of length zero, or made so short by the steps before that ||g_i||^2 <= rank_eps ||original g_i||^2, is neither
changed nor compared, and leaves its targets alone; all parts share the step's random orders.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from gsdg.errors import UserError, check_literal
from gsdg.surgery.rules.base import GramRule, Metrics, Reduction, conflicts
from gsdg.surgery.rules.precision import max_weight, rank_eps
from gsdg.surgery.rules.projection import drawn_pairs, inner, rows_of


class GradVac(GramRule):
    """beta: how fast a target follows the cosines seen, in [0, 1] (the paper: 0.01). reduction: "sum" or "mean"."""

    per_part_state = True

    def __init__(self, *, beta: float = 0.01, reduction: Reduction = "sum") -> None:
        if isinstance(beta, bool) or not isinstance(beta, Real) or not 0 <= beta <= 1:
            raise UserError(f"beta is {beta!r}; it is the rate of a moving average, a number from 0 to 1")
        check_literal("reduction", reduction, Reduction)
        self.beta, self.reduction = beta, reduction
        self._targets: Tensor | None = None  # [D, D, K]

    def start_step(self, n_domains: int) -> None:
        self._pairs = drawn_pairs(n_domains)

    def coefficients(self, M: Tensor, gram_eps: float) -> tuple[Tensor, Metrics]:
        targets = self._targets_like(M)
        originals = rows_of(M)
        rows = list(originals)
        for i, j in self._pairs:
            length_i, length_j = inner(rows[i], rows[i]).clamp_min(0).sqrt(), M[j, j].clamp_min(0).sqrt()
            original_i = M[i, i].clamp_min(0).sqrt()
            scale, target = length_i * length_j, targets[i, j]
            alive = (length_i > math.sqrt(rank_eps(gram_eps)) * original_i) & (length_j > 0)
            cosine = torch.where(alive, inner(rows[i], originals[j]) / scale, 0.0).clamp(-1, 1)
            sine, target_sine = _sine(cosine), _sine(target).clamp_min(1 / max_weight(gram_eps))
            factor = length_i * (target * sine - cosine * target_sine) / (length_j * target_sine)
            adjust = alive & (cosine < target - gram_eps)
            rows[i] = rows[i] + torch.where(adjust, factor, 0.0) * originals[j]
            targets[i, j] = torch.where(alive, (1 - self.beta) * target + self.beta * cosine, target)
        self._targets = targets
        C = torch.stack([row[0] for row in rows])
        return (C if self.reduction == "sum" else C / len(M)), conflicts(M, gram_eps)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._targets is None else {"targets": self._targets}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._targets = state.get("targets")

    def _targets_like(self, M: Tensor) -> Tensor:
        """The targets [D, D, K] to change in this step: zeros at first, and after a change of the domains' number."""
        if self._targets is None or self._targets.shape != M.shape:
            return torch.zeros_like(M)
        return self._targets.to(M.device, copy=True)


def _sine(cosine: Tensor) -> Tensor:
    return (1 - cosine.square()).clamp_min(0).sqrt()
