"""The base classes of weight averaging.

The trainer calls an averaging after every step and every evaluation, and asks it for the mean to evaluate. Steps are
numbered as in the records: the weights of step s are those after s + 1 updates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from gsdg.algorithms import Algorithm
from gsdg.averaging.weights import WeightMean, Weights, with_mean


class Averaging(ABC):
    """An average of the weights along training. Subclasses take keyword-only settings and check their values at once.

    Attributes:
        name: name of the averaging in the rows that it adds to the results.
        needs_losses: whether `after_evaluation` needs the held-out loss of the source domains.
        depends_on_steps: whether an evaluation before the last one depends on the number of steps of the run.
    """

    name: ClassVar[str]
    needs_losses: ClassVar[bool] = False
    depends_on_steps: ClassVar[bool] = False

    def check(self, evaluations: Sequence[int]) -> None:  # noqa: B027
        """Raise a UserError if there could be no mean in a run with evaluations after these steps."""

    def setup(self, algorithm: Algorithm, evaluations: Sequence[int]) -> None:
        """Start a new average of the algorithm's weights.

        Args:
            algorithm: the algorithm, ready for training.
            evaluations: the steps after which there is an evaluation, in order.
        """
        self.algorithm, self.last_evaluation = algorithm, evaluations[-1]
        self.weights = Weights(algorithm)

    @abstractmethod
    def after_step(self, step: int) -> None:
        """Take note that the weights were updated. Must not synchronize with the device."""

    def after_evaluation(self, step: int, loss: float) -> None:  # noqa: B027
        """Take note that the weights were evaluated.

        Must be idempotent per step: it is called again for the same step if the evaluation of the mean was interrupted.

        Args:
            loss: mean held-out loss of the source domains; NaN unless `needs_losses`.
        """

    @abstractmethod
    def mean(self, step: int) -> WeightMean | None:
        """The mean to evaluate after the evaluation of this step, or None. The mean of the last evaluation is saved."""

    def metadata(self, mean: WeightMean) -> dict:
        """What a row of the results contains about its mean, apart from the accuracies."""
        return {"averaging": self.name, "start": mean.start, "end": mean.end, "n": mean.n}

    def averaged(self, mean: WeightMean) -> Algorithm:
        """A copy of the algorithm with the mean as its weights."""
        return with_mean(self.algorithm, self.weights, mean)

    @abstractmethod
    def state_dict(self) -> dict: ...

    @abstractmethod
    def load_state_dict(self, state: dict) -> None: ...


class RunningMean(Averaging):
    """A single mean on the training device, evaluated together with the weights as soon as it has started."""

    @abstractmethod
    def includes(self, step: int) -> bool:
        """Whether the weights of this step are part of the mean."""

    @abstractmethod
    def share(self, n: int) -> float:
        """The weight of the n-th included weights in the mean at that time; 1 for n = 1."""

    def setup(self, algorithm: Algorithm, evaluations: Sequence[int]) -> None:
        super().setup(algorithm, evaluations)
        self.running = WeightMean(self.weights())

    def after_step(self, step: int) -> None:
        if self.includes(step):
            self.running.add(self.weights(), self.share(self.running.n + 1), start=step, end=step)

    def mean(self, step: int) -> WeightMean | None:
        return self.running if self.running.n else None

    def state_dict(self) -> dict:
        return self.running.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.running.load_state_dict(state)
