"""SWAD, stochastic weight averaging densely (Cha et al., NeurIPS 2021, arXiv:2102.08604): the mean of the weights of
every step in the valley of the source domains' held-out loss.

    mean = 1 / (t_e - t_s + 1)  sum_(t = t_s .. t_e) theta_t

`valley.py` determines t_s and t_e from the held-out cross-entropy, averaged over the source domains, at each
evaluation. The weights between two evaluations, a segment, are averaged as they come. Segments of which it is not yet
known whether they belong to the valley wait in host memory, at most `n_tolerance` of them.

Deviations from the released code: there, segments are counted twice or left out (`ReleasedValley`), and each segment
has the same weight whatever its number of steps; `as_released: true` does both. Its training stops when the valley has
ended; here training continues to the last step, which changes only the records of the plain weights. It estimates the
statistics of BatchNorm layers in train mode again over 500 batches; here they are averaged (`weights.py`). If the loss
has not converged, both use the last segment.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

from gsdg.algorithms import Algorithm
from gsdg.averaging.base import Averaging
from gsdg.averaging.valley import LossValley, ReleasedValley
from gsdg.averaging.weights import WeightMean
from gsdg.utils.errors import UserError

log = logging.getLogger(__name__)


class SWAD(Averaging):
    """Mean of the weights of every step in the valley of the held-out loss.

    Args:
        n_converge: number of evaluations N, >= 1: the loss has converged when the oldest of the last N evaluations has
            the lowest loss. The paper's N_s.
        n_tolerance: number of evaluations in a row with a loss above the threshold after which the valley has ended,
            >= 1. The paper's N_e.
        tolerance_ratio: the threshold is (1 + tolerance_ratio) times the mean loss of the N evaluations, >= 0. The
            paper's r.
        as_released: whether to choose and weight the segments as the released code does.
    """

    name: ClassVar[str] = "swad"
    needs_losses: ClassVar[bool] = True
    depends_on_steps: ClassVar[bool] = True  # the mean is evaluated once, after the last step

    def __init__(self, *, n_converge: int, n_tolerance: int, tolerance_ratio: float, as_released: bool = False) -> None:
        for key, value in {"n_converge": n_converge, "n_tolerance": n_tolerance}.items():
            if value < 1:
                raise UserError(f"trainer.averaging.{key}: found {value}, expected 1 evaluation or more.")
        if not tolerance_ratio >= 0:
            raise UserError(f"trainer.averaging.tolerance_ratio: found {tolerance_ratio}, expected 0 or more.")
        self.n_converge, self.n_tolerance, self.tolerance_ratio = n_converge, n_tolerance, tolerance_ratio
        self.as_released = as_released

    def check(self, evaluations: Sequence[int]) -> None:
        n_evaluations, needed = len(evaluations), self.n_converge
        if n_evaluations < needed:
            raise UserError(
                f"trainer/averaging=swad needs {needed} evaluations (trainer.averaging.n_converge) to see whether the "
                f"loss has converged, found {n_evaluations}. Evaluate more often (trainer.eval_every) or train longer."
            )

    def setup(self, algorithm: Algorithm, evaluations: Sequence[int]) -> None:
        super().setup(algorithm, evaluations)
        self.valley = (ReleasedValley if self.as_released else LossValley)(
            n_converge=self.n_converge, n_tolerance=self.n_tolerance, tolerance_ratio=self.tolerance_ratio
        )
        self.segment = WeightMean(self.weights())
        self.waiting: dict[int, WeightMean] = {}  # finished segments that may still be added to the total
        self.total = WeightMean(self.weights(), "cpu")
        self.last_evaluated = -1

    def after_step(self, step: int) -> None:
        self.segment.add(self.weights(), 1 / (self.segment.n + 1), start=step, end=step)

    def after_evaluation(self, step: int, loss: float) -> None:
        if step == self.last_evaluated:
            return
        self.last_evaluated = step
        # This evaluation ends the current segment, whose loss it measured.
        self.waiting[len(self.valley.losses)] = self.segment.on("cpu")
        self.segment.restart()
        # Add the segments that are now known to belong to the valley.
        had_converged, had_ended = self.valley.converged is not None, self.valley.ended
        self._add_segments(self.valley.update(loss))
        if step == self.last_evaluation:
            self._add_segments(self.valley.finish())
        self._log_changes(step, had_converged, had_ended)
        # Free the segments that can no longer be added.
        self.waiting = {i: mean for i, mean in self.waiting.items() if i >= self.valley.oldest_needed()}

    def mean(self, step: int) -> WeightMean | None:
        return self.total if step == self.last_evaluation else None

    def metadata(self, mean: WeightMean) -> dict:
        return super().metadata(mean) | {"converged": self.valley.converged is not None}

    def _add_segments(self, segments: Sequence[int]) -> None:
        for mean in (self.waiting[i] for i in segments):
            n = 1 if self.as_released else mean.n
            self.total.add(mean.tensors, n / (self.total.n + n), start=mean.start, end=mean.end, n=n)

    def _log_changes(self, step: int, had_converged: bool, had_ended: bool) -> None:
        valley = self.valley
        if valley.converged is not None and not had_converged:
            log.info("swad: the loss has converged by step %d; threshold %.4f", step + 1, valley.threshold)
        if valley.ended and not had_ended:
            log.info("swad: the valley ended at step %d, detected at step %d", self.total.end + 1, step + 1)
        if step == self.last_evaluation and valley.converged is None:
            log.warning("swad: the loss has not converged: the average is of the last segment only")

    def state_dict(self) -> dict:
        waiting = {i: mean.state_dict() for i, mean in self.waiting.items()}
        return {
            "losses": self.valley.losses,
            "evaluated": self.last_evaluated,
            "segment": self.segment.state_dict(),
            "waiting": waiting,
            "total": self.total.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        for loss in state["losses"]:  # the state of the valley is a function of the losses
            self.valley.update(loss)
        self.last_evaluated = state["evaluated"]
        self.segment.load_state_dict(state["segment"])
        self.total.load_state_dict(state["total"])
        for i, mean in state["waiting"].items():
            self.waiting[i] = WeightMean(self.weights(), "cpu")
            self.waiting[i].load_state_dict(mean)
