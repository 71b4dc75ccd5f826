"""SWA, stochastic weight averaging (Izmailov et al., UAI 2018, arXiv:1803.05407): the plain mean of weights.

    mean = 1 / n  sum_k theta_(start + k every)

With `every: 1` and `start: 598` this is the average of ERM++ (Teterwak et al., arXiv:2304.01973) as in DomainBed: the
mean of the weights after 599, 600, ... updates.

Deviations: the learning rate is the optimizer's; the paper's is cyclic, or high and constant. There is no result of the
average before `start`, where ERM++ predicts with the weights themselves. BatchNorm statistics are averaged, not
estimated again on training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from gsdg.averaging.base import RunningMean
from gsdg.utils.errors import UserError


class SWA(RunningMean):
    """Plain mean of the weights of every `every`-th step from `start` on.

    Args:
        start: step of the first weights in the mean, >= 0.
        every: number of steps from one of these weights to the next, >= 1.
    """

    name: ClassVar[str] = "swa"

    def __init__(self, *, start: int, every: int) -> None:
        if start < 0:
            raise UserError(f"trainer.averaging.start: found {start}, expected a step, 0 or more.")
        if every < 1:
            raise UserError(f"trainer.averaging.every: found {every}, expected a number of steps, 1 or more.")
        self.start, self.every = start, every

    def check(self, evaluations: Sequence[int]) -> None:
        if self.start > evaluations[-1]:
            raise UserError(
                f"trainer.averaging.start: found {self.start}, after the last evaluation (step {evaluations[-1]}): "
                "the average would never be evaluated. Start earlier, or train longer (trainer.steps)."
            )

    def includes(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == 0

    def share(self, n: int) -> float:
        return 1 / n
