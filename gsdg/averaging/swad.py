"""SWAD, stochastic weight averaging densely (Cha et al., NeurIPS 2021, arXiv:2102.08604): the mean of the weights of
every step in the valley of the sources' held-out loss.

    mean = 1 / (t_e - t_s + 1)  sum_(t = t_s .. t_e) theta_t

t_s and t_e are found as `valley.py` says, from the mean over the sources of their held-out cross-entropy at each
evaluation. The weights between two evaluations, a segment, are averaged as they come; the segments of which it is not
known yet whether they are in the valley wait in the host's memory, `n_tolerance` of them at most.

Deviations from the released code: there segments enter twice or are left out (`ReleasedValley`), and a segment counts
one whatever its number of steps; `as_released: true` does both. Its training stops when the valley is dead; here it
goes on to its last step, which changes the plain records only. It re-estimates the statistics of a BatchNorm that
trains over 500 batches; here they are averaged (`weights.py`). Where the loss has not converged both take the last
segment.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

from gsdg.algorithms import Algorithm
from gsdg.averaging.base import Averaging
from gsdg.averaging.valley import LossValley, ReleasedValley
from gsdg.averaging.weights import Mean
from gsdg.errors import UserError

log = logging.getLogger(__name__)


class SWAD(Averaging):
    """n_converge: evaluations of which the first has the least loss when it has converged. n_tolerance: losses in a
    row that are above (1 + tolerance_ratio) times their mean when the valley is dead."""

    name: ClassVar[str] = "swad"
    needs_losses: ClassVar[bool] = True

    def __init__(self, *, n_converge: int, n_tolerance: int, tolerance_ratio: float, as_released: bool = False) -> None:
        for key, value in {"n_converge": n_converge, "n_tolerance": n_tolerance}.items():
            if value < 1:
                raise UserError(f"trainer.averaging.{key}: found {value}, expected 1 evaluation or more.")
        if not tolerance_ratio >= 0:
            raise UserError(f"trainer.averaging.tolerance_ratio: found {tolerance_ratio}, expected 0 or more.")
        self.options = {"n_converge": n_converge, "n_tolerance": n_tolerance, "tolerance_ratio": tolerance_ratio}
        self.as_released = as_released

    def check(self, evaluations: Sequence[int]) -> None:
        found, needed = len(evaluations), self.options["n_converge"]
        if found < needed:
            raise UserError(
                f"trainer/averaging=swad looks at {needed} evaluations (trainer.averaging.n_converge) to see that the "
                f"loss has converged, and there are {found}. Evaluate more often (trainer.eval_every) or train longer."
            )

    def setup(self, algorithm: Algorithm, evaluations: Sequence[int]) -> None:
        super().setup(algorithm, evaluations)
        self.valley = (ReleasedValley if self.as_released else LossValley)(**self.options)
        self.segment = Mean(self.weights())
        self.waiting: dict[int, Mean] = {}
        self.total = Mean(self.weights(), "cpu")
        self.evaluated = -1

    def after_step(self, step: int) -> None:
        self.segment.add(self.weights(), 1 / (self.segment.n + 1), start=step, end=step)

    def after_evaluation(self, step: int, loss: float) -> None:
        if step == self.evaluated:
            return
        self.evaluated = step
        self.waiting[len(self.valley.losses)] = self.segment.on("cpu")
        self.segment.restart()
        began, died = self.valley.converged is not None, self.valley.dead
        self._enter(self.valley.after(loss))
        if step == self.last:
            self._enter(self.valley.rest())
        self._tell(step, began, died)
        self.waiting = {i: mean for i, mean in self.waiting.items() if i >= self.valley.oldest()}

    def mean(self, step: int) -> Mean | None:
        return self.total if step == self.last else None

    def facts(self, mean: Mean) -> dict:
        return super().facts(mean) | {"converged": self.valley.converged is not None}

    def _enter(self, segments: Sequence[int]) -> None:
        for mean in (self.waiting[i] for i in segments):
            n = 1 if self.as_released else mean.n
            self.total.add(mean.tensors, n / (self.total.n + n), start=mean.start, end=mean.end, n=n)

    def _tell(self, step: int, began: bool, died: bool) -> None:
        valley = self.valley
        if valley.converged is not None and not began:
            log.info("swad: the loss has converged by step %d; threshold %.4f", step, valley.threshold)
        if valley.dead and not died:
            log.info("swad: the valley is dead at step %d; it ended at step %d", step, self.total.end)
        if step == self.last and valley.converged is None:
            log.warning("swad: the loss has not converged: the average is of the last segment only")

    def state_dict(self) -> dict:
        waiting = {i: mean.state_dict() for i, mean in self.waiting.items()}
        return {
            "losses": self.valley.losses,
            "evaluated": self.evaluated,
            "segment": self.segment.state_dict(),
            "waiting": waiting,
            "total": self.total.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        for loss in state["losses"]:  # the valley is a function of them
            self.valley.after(loss)
        self.evaluated = state["evaluated"]
        self.segment.load_state_dict(state["segment"])
        self.total.load_state_dict(state["total"])
        for i, mean in state["waiting"].items():
            self.waiting[i] = Mean(self.weights(), "cpu")
            self.waiting[i].load_state_dict(mean)
