"""SWAD's loss valley: from the held-out losses alone, which segments of the training enter the average.

A segment is what lies between two evaluations: segment i ends with the i-th, whose loss it bears. The loss has
converged at c when it is the least of the `n_converge` from c on. The valley's threshold is (1 + tolerance_ratio) times
their mean. The valley is dead when `n_tolerance` losses in a row are above it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class LossValley:
    """Every segment from the first to the last of the valley, once.

    The first is the earliest from which to c no loss is above the threshold, among the `n_tolerance` latest at the
    time when c is found (by default up to three before c; the paper has c itself). The last is the last whose loss is
    not above it, before the valley is dead.
    """

    def __init__(self, *, n_converge: int, n_tolerance: int, tolerance_ratio: float) -> None:
        self.n_converge, self.n_tolerance, self.tolerance_ratio = n_converge, n_tolerance, tolerance_ratio
        self.losses: list[float] = []
        self.converged: int | None = None  # c
        self.dead = False
        self.entered = 0  # segments before this one have entered, or never will

    def after(self, loss: float) -> list[int]:
        """The segments that enter after the next evaluation's loss, in order."""
        self.losses.append(loss)
        if self.converged is None:
            return self._begin() if self._converges() else []
        return self._go_on()

    def rest(self) -> list[int]:
        """Those that enter when no evaluation follows: where the loss has not converged, the last one."""
        return [] if self.converged is not None else [len(self.losses) - 1]

    def oldest(self) -> int:
        """The first segment that may still enter."""
        if self.converged is not None:
            return len(self.losses) if self.dead else self.entered
        return max(0, len(self.losses) + 1 - max(self.n_converge, self.n_tolerance))

    def _converges(self) -> bool:
        window = self.losses[-self.n_converge :]
        if len(window) < self.n_converge or np.argmin(window) != 0:
            return False
        self.converged = len(self.losses) - self.n_converge
        self.threshold = float(np.mean(window)) * (1 + self.tolerance_ratio)
        return True

    def _begin(self) -> list[int]:
        start = self.converged
        while start > max(0, len(self.losses) - self.n_tolerance) and self.losses[start - 1] <= self.threshold:
            start -= 1
        self.seen = self.end = self.converged
        self.entered = start
        return self._go_on()

    def _go_on(self) -> list[int]:
        for i in range(self.seen + 1, len(self.losses)):
            if self.losses[i] <= self.threshold and not self.dead:
                self.end = i
            self.dead = self.dead or i - self.end >= self.n_tolerance
        self.seen = len(self.losses) - 1
        entering = list(range(self.entered, self.end + 1))
        self.entered = self.end + 1
        return entering


class ReleasedValley(LossValley):
    """What the released code does, to compare with its numbers.

    When the loss converges, of the segments up to c the first good one is left out, c itself enters, and again when
    it becomes the oldest of the `n_tolerance` latest, one of which enters after each evaluation from then on (issue 28
    there). Where fewer than `n_tolerance` evaluations came before, segments after c are taken for ones up to c, and the
    oldest one enters several times over. At the end those of the latest enter but the oldest, whether they have or not.
    """

    def after(self, loss: float) -> list[int]:
        self.losses.append(loss)
        if self.dead:
            return []
        latest = self._latest()
        if self.converged is None:
            return self._first(latest) if self._converges() else []
        if latest[0] < self.converged:
            return []
        self.dead = not self._good(latest)
        self.entered += not self.dead
        return [] if self.dead else [latest[0]]

    def rest(self) -> list[int]:
        if self.converged is None:
            return super().rest()
        latest, found = self._latest(), []
        if not self.dead:
            found = [i for i in latest[1:] if self._good(range(i, latest[-1] + 1))]
        return found if found or self.entered else [self.converged]

    def oldest(self) -> int:
        if self.dead and self.entered:
            return len(self.losses)
        keep = max(0, len(self.losses) + 1 - max(self.n_converge, self.n_tolerance))
        return keep if self.entered or self.converged is None else min(keep, self.converged)

    def _latest(self) -> list[int]:
        return list(range(len(self.losses)))[-self.n_tolerance :]

    def _good(self, segments: Sequence[int]) -> bool:
        return min(self.losses[i] for i in segments) <= self.threshold

    def _first(self, latest: list[int]) -> list[int]:
        more = self.n_tolerance - self.n_converge
        if more < 0:
            found = [self.converged + 1 + i for i in range(-more)]
        else:
            above = [place for place, i in enumerate(latest[: more + 1]) if self.losses[i] > self.threshold]
            found = latest[: more + 1][(above[-1] + 1 if above else 0) + 1 :] if more else []
        self.entered = len(found)
        return found
