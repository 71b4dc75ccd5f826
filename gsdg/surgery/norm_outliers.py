"""The norm-outlier correction of GradSurgery (ECAI 2024): a stage after any Gram rule, switched on by alpha < 1.

Per tensor (per part, where a part is more than one tensor), n_i = the norm of domain i's modified gradient. A domain
with |n_i - mean(n)| > std(n), the population's, is an outlier and becomes alpha g_i + (1 - alpha) mu, mu the mean of
the others.

Deliberate deviation from the released code: an outlier needs a distance of std + gram_eps * mean. With two domains both
distances equal the std, and rounding would decide.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from gsdg.errors import UserError, check_literal

AlphaSchedule = Literal["constant", "log"]


class NormOutliers:
    """alpha: weight of an outlier's own gradient, in [0, 1]; 1 switches the stage off.

    schedule: "constant", or "log": 1 - ln(t + 1) / ln(total_steps) in place of alpha, t = 0 at the first step.
    """

    def __init__(
        self, alpha: float = 0.6, *, schedule: AlphaSchedule = "constant", total_steps: int | None = None
    ) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 <= alpha <= 1:
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
        return self.schedule == "constant" and self.alpha == 1

    def alpha_at(self, step: int | Tensor) -> float | Tensor:
        """The blend weight at this step, 0 being the first; of a 0-dim step on a device it is 0-dim there."""
        if self.schedule == "constant":
            return float(self.alpha)
        if isinstance(step, Tensor):
            return (1 - (step + 1).log() / math.log(self.total_steps)).clamp(0, 1)
        return min(1.0, max(0.0, 1 - math.log(step + 1) / math.log(self.total_steps)))

    def shares(self, norms: Tensor, step: int | Tensor, gram_eps: float) -> Tensor:
        """norms [U, D] of the modified gradients -> what each contributes to the sum after the blend, [U, D].

        An outlier keeps alpha of itself; the 1 - alpha that it gives up is shared equally by the others.
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
    """C, M [D, D, K] -> [K, D], the squared norms of the modified gradients of the parts: the diagonal of C M C^T."""
    CM = torch.stack([(row.unsqueeze(1) * M).sum(0) for row in C])  # [D, D, K]
    return (CM * C).sum(1).clamp_min(0).t()
