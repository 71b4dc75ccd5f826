"""What an averaging is: told of every step and every evaluation, asked for the mean that is to be evaluated.

Steps are counted as in the records: the weights of step s are those after s + 1 updates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from gsdg.algorithms import Algorithm
from gsdg.averaging.weights import Mean, Weights, with_mean


class Averaging(ABC):
    """Subclasses take keyword-only settings and check them at once. Nothing in `after_step` makes the host wait.

    name: of the rows it makes. needs_losses: whether it wants the sources' held-out loss at each evaluation.
    """

    name: ClassVar[str]
    needs_losses: ClassVar[bool] = False

    def check(self, evaluations: Sequence[int]) -> None:  # noqa: B027
        """UserError if nothing could come of it in a run that is evaluated after these steps."""

    def setup(self, algorithm: Algorithm, evaluations: Sequence[int]) -> None:
        """Take the algorithm, ready to be trained, and begin anew."""
        self.algorithm, self.last = algorithm, evaluations[-1]
        self.weights = Weights(algorithm)

    @abstractmethod
    def after_step(self, step: int) -> None:
        """The weights have been updated."""

    def after_evaluation(self, step: int, loss: float) -> None:  # noqa: B027
        """They have been evaluated; loss: the mean held-out loss of the sources, NaN unless it is needed.

        Called again for the same step where the evaluation of the mean was cut short: the second call is as none.
        """

    @abstractmethod
    def mean(self, step: int) -> Mean | None:
        """What is to be evaluated after the evaluation of this step, and, after the last one's, to be left on disk."""

    def facts(self, mean: Mean) -> dict:
        """What a row tells of its mean beside the accuracies."""
        return {"averaging": self.name, "start": mean.start, "end": mean.end, "n": mean.n}

    def averaged(self, mean: Mean) -> Algorithm:
        """The algorithm with the mean for its weights."""
        return with_mean(self.algorithm, self.weights, mean)

    @abstractmethod
    def state_dict(self) -> dict: ...

    @abstractmethod
    def load_state_dict(self, state: dict) -> None: ...


class RunningMean(Averaging):
    """One mean on the training device, evaluated whenever the weights are, once it has begun."""

    @abstractmethod
    def takes(self, step: int) -> bool:
        """Whether the weights of this step enter."""

    @abstractmethod
    def share(self, n: int) -> float:
        """Of the n-th weights that enter, when they do; 1 for the first."""

    def setup(self, algorithm: Algorithm, evaluations: Sequence[int]) -> None:
        super().setup(algorithm, evaluations)
        self.running = Mean(self.weights())

    def after_step(self, step: int) -> None:
        if self.takes(step):
            self.running.add(self.weights(), self.share(self.running.n + 1), start=step, end=step)

    def mean(self, step: int) -> Mean | None:
        return self.running if self.running.n else None

    def state_dict(self) -> dict:
        return self.running.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.running.load_state_dict(state)
