"""EMA, the exponential moving average of the weights of all steps (Polyak averaging with forgetting).

    mean_t = sum_i decay^(t-i) theta_i / sum_i decay^(t-i),   i = 1..t
           = mean_(t-1) + share_t (theta_t - mean_(t-1)),     share_t = (1 - decay) / (1 - decay^t)

The shares of t weights sum to 1 from the first step on: early it is nearly their plain mean, later the share is
1 - decay. mean <- decay mean + (1 - decay) theta, begun at theta_0, would hold on to the weights before training.
"""

from __future__ import annotations

from typing import ClassVar

from gsdg.averaging.base import RunningMean
from gsdg.errors import UserError


class EMA(RunningMean):
    """decay: what is left of a weight's share after another step; 0.999 looks back about 1,000 steps."""

    name: ClassVar[str] = "ema"

    def __init__(self, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"trainer.averaging.decay: found {decay}, expected 0 or more, below 1 (such as 0.999).")
        self.decay = decay

    def takes(self, step: int) -> bool:
        return True

    def share(self, n: int) -> float:
        return (1 - self.decay) / (1 - self.decay**n)
