"""The norm-outlier correction of GradSurgery (ECAI 2024): a stage after any Gram rule, switched on by alpha < 1.

Let n_i be the norm of domain i's modified gradient of one tensor (of one part, where a part spans several tensors).
Domain i is an outlier if |n_i - mean(n)| > std(n), the population standard deviation. The gradient of an outlier
becomes alpha g_i + (1 - alpha) mu, where mu is the mean of the gradients of the other domains.

Deliberate deviation from the released code: the distance must exceed std + gram_eps * mean. With two domains both
distances equal the standard deviation, so that rounding would decide.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from gsdg.surgery.rules.base import is_number
from gsdg.utils.errors import UserError, check_literal

AlphaSchedule = Literal["constant", "log"]


class NormOutliers:
    """The norm-outlier correction and the schedule of its blend weight.

    Args:
        alpha: weight of an outlier's own gradient, in [0, 1]; 1 switches the correction off. The paper uses 0.6.
        schedule: "constant", or "log": the weight is 1 - ln(t + 1) / ln(total_steps) instead of alpha; t = 0 at the
            first step.
        total_steps: the length of training in steps, an integer >= 2; only for schedule "log".
    """

    def __init__(
        self, alpha: float = 0.6, *, schedule: AlphaSchedule = "constant", total_steps: int | None = None
    ) -> None:
        if not is_number(alpha) or not 0 <= alpha <= 1:
            raise UserError(f"alpha is {alpha!r}; it is the blend weight of norm outliers, a number from 0 to 1")
        check_literal("alpha_schedule", schedule, AlphaSchedule)
        if schedule == "log" and (not isinstance(total_steps, int) or total_steps < 2):
            raise UserError(
                f"alpha_schedule='log' needs the length of training, but total_steps is {total_steps!r}; "
                "give the number of steps, an integer >= 2"
            )
        self.alpha, self.schedule, self.total_steps = alpha, schedule, total_steps

    @property
    def off(self) -> bool:
        """Whether the correction changes nothing at any step."""
        return self.schedule == "constant" and self.alpha == 1

    def alpha_at(self, step: int | Tensor) -> float | Tensor:
        """The blend weight at this step, 0 being the first; a 0-dim tensor for a 0-dim step, on its device."""
        if self.schedule == "constant":
            return float(self.alpha)
        assert self.total_steps is not None, "the constructor has checked it"
        if isinstance(step, Tensor):
            return (1 - (step + 1).log() / math.log(self.total_steps)).clamp(0, 1)
        return min(1.0, max(0.0, 1 - math.log(step + 1) / math.log(self.total_steps)))

    def shares(self, norms: Tensor, step: int | Tensor, gram_eps: float) -> Tensor:
        """The factor of each domain's modified gradient in the sum over domains, after the correction.

        An outlier keeps alpha of its gradient. The 1 - alpha that it gives up is distributed equally over the others.

        Args:
            norms: [U, D], of the modified gradients of each unit.
        Returns: [U, D].
        """
        alpha = self.alpha_at(step)
        mean = norms.mean(1, keepdim=True)
        distance = (norms - mean).abs()
        std = distance.square().mean(1, keepdim=True).sqrt()
        outlier = (distance > std + gram_eps * mean).to(norms.dtype)
        given_up = (1 - alpha) * outlier.sum(1, keepdim=True)
        n_others = (1 - outlier).sum(1, keepdim=True).clamp_min(1)
        return alpha * outlier + (1 - outlier) * (1 + given_up / n_others)


def modified_squares(C: Tensor, M: Tensor) -> Tensor:
    """The squared norms [K, D] of the modified gradients of the parts: the diagonals of C M C^T; C, M [D, D, K]."""
    CM = torch.stack([(row.unsqueeze(1) * M).sum(0) for row in C])  # [D, D, K]
    return (CM * C).sum(1).clamp_min(0).t()
