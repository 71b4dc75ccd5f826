"""SWAD's loss valley: which segments of the training are averaged, determined from the held-out losses alone.

A segment is the training between two evaluations: segment i ends with evaluation i and has that evaluation's loss. The
loss has converged at segment c if it is the lowest of the `n_converge` losses from c on. The threshold of the valley is
(1 + tolerance_ratio) times the mean of these losses. The valley has ended when `n_tolerance` losses in a row are above
the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class LossValley:
    """All segments from the first to the last segment of the valley, once each.

    The first segment is the earliest one from which to c no loss is above the threshold, among the `n_tolerance` latest
    segments at the time when c is detected (with the defaults at most three before c; in the paper it is c). The last
    segment is the last one before the valley has ended whose loss is not above the threshold.

    Args:
        n_converge, n_tolerance, tolerance_ratio: see above.

    Attributes:
        losses: the losses so far, one per segment.
        converged: c; None before the loss has converged.
        threshold: the valley's threshold; NaN before the loss has converged.
        ended: whether the valley has ended.
    """

    def __init__(self, *, n_converge: int, n_tolerance: int, tolerance_ratio: float) -> None:
        self.n_converge, self.n_tolerance, self.tolerance_ratio = n_converge, n_tolerance, tolerance_ratio
        self.losses: list[float] = []
        self.converged: int | None = None
        self.threshold = float("nan")
        self.ended = False
        self._next = 0  # first segment that may still be averaged
        self._checked = self._last_good = -1  # last segment that `_continue` has seen; last one below the threshold

    def update(self, loss: float) -> list[int]:
        """Add the loss of the next evaluation; return the segments that are now known to be averaged, in order."""
        self.losses.append(loss)
        if self.converged is not None:
            return self._continue()
        self.converged = self._converged_at()
        return [] if self.converged is None else self._begin(self.converged)

    def finish(self) -> list[int]:
        """The segments to average in addition after the last evaluation: the last one if the loss has not converged."""
        return [] if self.converged is not None else [len(self.losses) - 1]

    def oldest_needed(self) -> int:
        """The first segment that may still be returned by `update` or `finish`."""
        if self.converged is not None:
            return len(self.losses) if self.ended else self._next
        return max(0, len(self.losses) + 1 - max(self.n_converge, self.n_tolerance))

    def _converged_at(self) -> int | None:
        """The segment c, and set the threshold; None if the loss has not converged yet."""
        window = self.losses[-self.n_converge :]
        if len(window) < self.n_converge or np.argmin(window) != 0:
            return None
        self.threshold = float(np.mean(window)) * (1 + self.tolerance_ratio)
        return len(self.losses) - self.n_converge

    def _begin(self, converged: int) -> list[int]:
        start = converged
        while start > max(0, len(self.losses) - self.n_tolerance) and self.losses[start - 1] <= self.threshold:
            start -= 1
        self._checked = self._last_good = converged
        self._next = start
        return self._continue()

    def _continue(self) -> list[int]:
        for i in range(self._checked + 1, len(self.losses)):
            if self.losses[i] <= self.threshold and not self.ended:
                self._last_good = i
            self.ended = self.ended or i - self._last_good >= self.n_tolerance
        self._checked = len(self.losses) - 1
        segments = list(range(self._next, self._last_good + 1))
        self._next = self._last_good + 1
        return segments


class ReleasedValley(LossValley):
    """The segments that the released code averages, for comparison with its numbers; see `released_segments`."""

    def __init__(self, *, n_converge: int, n_tolerance: int, tolerance_ratio: float) -> None:
        super().__init__(n_converge=n_converge, n_tolerance=n_tolerance, tolerance_ratio=tolerance_ratio)
        self._averaged: list[int] = []
        self._at_end: list[int] = []

    def update(self, loss: float) -> list[int]:
        self.losses.append(loss)
        n_before = len(self._averaged)
        self._averaged, self._at_end, self.converged, self.threshold, self.ended = released_segments(
            self.losses, N_s=self.n_converge, N_e=self.n_tolerance, r=1 + self.tolerance_ratio
        )
        return self._averaged[n_before:]

    def finish(self) -> list[int]:
        return self._at_end

    def oldest_needed(self) -> int:
        if self.ended and self._averaged:
            return len(self.losses)
        keep = max(0, len(self.losses) + 1 - max(self.n_converge, self.n_tolerance))
        return keep if self._averaged or self.converged is None else min(keep, self.converged)


class ReleasedSegments(NamedTuple):
    """Result of `released_segments`."""

    averaged: list[int]  # segments averaged so far, in order, possibly several times
    at_end: list[int]  # segments to average in addition if no evaluation follows
    t_s: int | None  # segment at which the loss has converged
    threshold: float
    ended: bool


def released_segments(losses: Sequence[float], *, N_s: int, N_e: int, r: float) -> ReleasedSegments:
    """Which segments the released code averages, given the losses so far.

    It differs from `LossValley` (issue 28 of the released code): at convergence the first good segment up to t_s is
    left out; t_s is counted then, and again as the oldest of the N_e latest segments. If there were fewer than N_e
    evaluations before, segments after t_s are taken for segments up to t_s, and the oldest segment is counted several
    times. At the end the good segments among the latest ones except the oldest are added, whether they were counted
    before or not.

    Args:
        losses: held-out loss of each segment.
        N_s: optimum patience, `n_converge`.
        N_e: overfit patience, `n_tolerance`.
        r: tolerance, 1 + `tolerance_ratio`.
    """
    averaged: list[int] = []
    t_s, threshold, ended = None, float("nan"), False
    latest: list[int] = []  # the N_e latest segments
    for t in range(len(losses)):
        latest = list(range(max(0, t + 1 - N_e), t + 1))
        if t_s is None:
            # Has the loss converged? Then begin with some of the segments up to t_s.
            window = losses[max(0, t + 1 - N_s) : t + 1]
            if len(window) == N_s and np.argmin(window) == 0:
                t_s = t + 1 - N_s
                threshold = float(np.mean(window)) * r
                if N_e < N_s:
                    averaged += range(t_s + 1, t_s + 1 + N_s - N_e)
                elif N_e > N_s:
                    candidates = latest[: N_e - N_s + 1]
                    bad = [i for i in candidates if losses[i] > threshold]
                    first_good = bad[-1] + 1 if bad else candidates[0]
                    averaged += [i for i in candidates if i > first_good]
        elif latest[0] >= t_s:
            # In the valley: add the oldest of the latest segments, unless all of them are bad.
            ended = not min(losses[i] for i in latest) <= threshold
            if ended:
                break
            averaged.append(latest[0])
    if t_s is None:
        at_end = latest[-1:]
    else:
        at_end = [] if ended else [i for i in latest[1:] if min(losses[i:]) <= threshold]
        at_end = at_end or ([] if averaged else [t_s])
    return ReleasedSegments(averaged, at_end, t_s, threshold, ended)
