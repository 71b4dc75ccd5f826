"""SWA, stochastic weight averaging (Izmailov et al., UAI 2018, arXiv:1803.05407): the plain mean of weights.

    mean = 1 / n  sum_k theta_(start + k every)

With `every: 1` and `start: 598` it is the average of ERM++ (Teterwak et al., arXiv:2304.01973), as DomainBed has it:
of the weights after 599, 600, ... updates, each once.

Deviations: the learning rate is the optimizer's; the paper's is cyclic, or high and constant. Nothing is recorded
before `start`, where ERM++ predicts with the weights themselves; nor does a BatchNorm of the mean see training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from gsdg.averaging.base import RunningMean
from gsdg.errors import UserError


class SWA(RunningMean):
    """start: the step of the first weights that enter; every: steps from these to the next."""

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
                "nothing would be seen of the average. Start earlier, or train longer (trainer.steps)."
            )

    def takes(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == 0

    def share(self, n: int) -> float:
        return 1 / n
