"""GradVac (Wang et al., "Gradient Vaccine", ICLR 2021, arXiv 2010.05874).

For each domain i and all other domains j in random order, with phi = cos(g_i, original g_j) and the target t = t_ij:

    if phi < t:  g_i += ||g_i|| (t sqrt(1 - phi^2) - phi sqrt(1 - t^2)) / (||g_j|| sqrt(1 - t^2)) g_j
    t_ij <- (1 - beta) t_ij + beta phi

The addition makes cos(g_i, g_j) = t_ij. The update is the sum over the domains. All targets start at 0, so that the
first step equals PCGrad. There is one target per part and ordered pair of domains; the checkpoint holds the targets.

Deviations:
- sqrt(1 - t^2) is at least 1 / max_weight: otherwise nearly identical gradients would divide by zero.
- A gradient of length zero, or one so shortened by earlier projections that ||g_i||^2 <= rank_eps ||original g_i||^2,
  is neither changed nor compared, and its targets are not updated.
- All parts share the random orders of a step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gsdg.surgery.rules.base import GramRule, Metrics, Reduction, conflicts, is_number
from gsdg.surgery.rules.precision import max_weight, rank_eps
from gsdg.surgery.rules.projection import initial_rows, inner, random_pairs
from gsdg.utils.errors import UserError, check_literal


class GradVac(GramRule):
    """GradVac: raises the cosine of each pair of domains to a moving target. Keeps state per part.

    Args:
        beta: the weight of the new cosine in the moving average of a target, in [0, 1]. The paper uses 0.01.
        reduction: "sum" or "mean" over the domains.
    """

    per_part_state = True

    def __init__(self, *, beta: float = 0.01, reduction: Reduction = "sum") -> None:
        if not is_number(beta) or not 0 <= beta <= 1:
            raise UserError(f"beta is {beta!r}; it is the rate of a moving average, a number from 0 to 1")
        check_literal("reduction", reduction, Reduction)
        self.beta, self.reduction = beta, reduction
        self._targets: Tensor | None = None  # [D, D, K]

    def start_step(self, n_domains: int) -> None:
        self._pairs = random_pairs(n_domains)

    def coefficients(self, M: Tensor, gram_eps: float) -> tuple[Tensor, Metrics]:
        targets = self._targets_like(M)
        originals = initial_rows(M)
        rows = list(originals)
        for i, j in self._pairs:
            length_i, length_j = inner(rows[i], rows[i]).clamp_min(0).sqrt(), M[j, j].clamp_min(0).sqrt()
            original_i = M[i, i].clamp_min(0).sqrt()
            scale, target = length_i * length_j, targets[i, j]
            nonzero = (length_i > math.sqrt(rank_eps(gram_eps)) * original_i) & (length_j > 0)
            cosine = torch.where(nonzero, inner(rows[i], originals[j]) / scale, 0.0).clamp(-1, 1)
            sine, target_sine = _sine(cosine), _sine(target).clamp_min(1 / max_weight(gram_eps))
            factor = length_i * (target * sine - cosine * target_sine) / (length_j * target_sine)
            adjust = nonzero & (cosine < target - gram_eps)
            rows[i] = rows[i] + torch.where(adjust, factor, 0.0) * originals[j]
            targets[i, j] = torch.where(nonzero, (1 - self.beta) * target + self.beta * cosine, target)
        self._targets = targets
        C = torch.stack([row[0] for row in rows])
        return (C if self.reduction == "sum" else C / len(M)), conflicts(M, gram_eps)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._targets is None else {"targets": self._targets}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._targets = state.get("targets")

    def _targets_like(self, M: Tensor) -> Tensor:
        """A copy of the targets [D, D, K] for this step; zeros at first and after the number of domains changed."""
        if self._targets is None or self._targets.shape != M.shape:
            return torch.zeros_like(M)
        return self._targets.to(M.device, copy=True)


def _sine(cosine: Tensor) -> Tensor:
    return (1 - cosine.square()).clamp_min(0).sqrt()
