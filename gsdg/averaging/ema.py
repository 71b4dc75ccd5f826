"""EMA, the exponential moving average of the weights of all steps (Polyak averaging with exponential forgetting).

    mean_t = sum_i decay^(t-i) theta_i / sum_i decay^(t-i),   i = 1..t
           = mean_(t-1) + share_t (theta_t - mean_(t-1)),     share_t = (1 - decay) / (1 - decay^t)

The coefficients of the t weights sum to 1 from the first step on: early on this is nearly their plain mean, later the
share of the new weights is 1 - decay. The usual recursion mean <- decay mean + (1 - decay) theta, started at theta_0,
would keep a part of the weights from before training.
"""

from __future__ import annotations

from typing import ClassVar

from gsdg.averaging.base import RunningMean
from gsdg.utils.errors import UserError


class EMA(RunningMean):
    """Exponential moving average of the weights.

    Args:
        decay: factor by which the coefficient of old weights shrinks per step, in [0, 1); 0.999 averages over about
            1,000 steps.
    """

    name: ClassVar[str] = "ema"

    def __init__(self, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"trainer.averaging.decay: found {decay}, expected 0 or more, below 1 (such as 0.999).")
        self.decay = decay

    def includes(self, step: int) -> bool:
        return True

    def share(self, n: int) -> float:
        return (1 - self.decay) / (1 - self.decay**n)
