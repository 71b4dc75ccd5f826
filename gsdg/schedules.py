"""Learning-rate schedules: factors of each parameter group's own learning rate, one per training step.

    lr of step s = base lr * factor(s),   s = 0, ..., S - 1

The first `warmup_steps` W have the factors 1/W, 2/W, ..., 1 (linear warm-up; Goyal et al., arXiv:1706.02677). The other
steps have the factor of the schedule at t = (s - W) / (S - W), the share of them that is done. All are applied by
torch's LambdaLR, which multiplies: learning rates that differ between groups (optimizer.groups) keep their ratios.

Any other scheduler of torch is a node of its own: trainer.scheduler={_target_: torch.optim.lr_scheduler.StepLR,
_partial_: true, step_size: 1000}. It is stepped once per training step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import cos, pi
from typing import ClassVar

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from gsdg.utils.errors import UserError, check_range

Scheduler = Callable[[Optimizer], LRScheduler]


class Schedule(ABC):
    """The factor of the learning rate in each step.

    Attributes:
        depends_on_steps: whether a factor depends on the number of steps of the run.
    """

    depends_on_steps: ClassVar[bool] = True

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """The factor of step `step`, counted from 0, of `steps`."""

    @abstractmethod
    def check(self, steps: int) -> None:
        """UserError if the schedule does not fit a run of `steps` steps."""


class WithWarmup(Schedule):
    """A schedule after a linear warm-up.

    Args:
        warmup_steps: W, 0 or more, less than the steps of the run; 0: no warm-up.
    """

    def __init__(self, *, warmup_steps: int) -> None:
        check_range("trainer.scheduler", "[0, inf)", warmup_steps=warmup_steps)
        self.warmup_steps = warmup_steps

    @abstractmethod
    def after(self, t: float) -> float:
        """The factor when the share t in [0, 1) of the steps after the warm-up is done."""

    def factor(self, step: int, steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after((step - self.warmup_steps) / (steps - self.warmup_steps))

    def check(self, steps: int) -> None:
        if self.warmup_steps >= steps:
            raise UserError(
                f"trainer.scheduler.warmup_steps={self.warmup_steps}: the run has only trainer.steps={steps}, so that "
                "the warm-up would never end. Set it lower."
            )


class Constant(WithWarmup):
    """The optimizer's learning rate, after a warm-up."""

    depends_on_steps = False

    def after(self, t: float) -> float:
        return 1.0

    def check(self, steps: int) -> None:
        super().check(steps)
        if not self.warmup_steps:
            raise UserError(
                "trainer/scheduler=constant without a warm-up changes nothing: set trainer.scheduler.warmup_steps, or "
                "leave the scheduler out."
            )


class Cosine(WithWarmup):
    """Half a period of a cosine, from 1 to `final` (SGDR without restarts; Loshchilov and Hutter, arXiv:1608.03983).

    Args:
        final: factor that the last steps approach, in [0, 1].
        warmup_steps: see WithWarmup.
    """

    def __init__(self, *, final: float, warmup_steps: int) -> None:
        super().__init__(warmup_steps=warmup_steps)
        check_range("trainer.scheduler", "[0, 1]", final=final)
        self.final = final

    def after(self, t: float) -> float:
        return self.final + (1 - self.final) * (1 + cos(pi * t)) / 2


class Polynomial(WithWarmup):
    """(1 - t)^power, from 1 to `final`; power 1: linear.

    Args:
        power: > 0.
        final: factor that the last steps approach, in [0, 1].
        warmup_steps: see WithWarmup.
    """

    def __init__(self, *, power: float, final: float, warmup_steps: int) -> None:
        super().__init__(warmup_steps=warmup_steps)
        check_range("trainer.scheduler", "(0, inf)", power=power)
        check_range("trainer.scheduler", "[0, 1]", final=final)
        self.power, self.final = power, final

    def after(self, t: float) -> float:
        return self.final + (1 - self.final) * (1 - t) ** self.power


class Steps(WithWarmup):
    """Multiplied by `gamma` at each milestone.

    Args:
        milestones: shares of the steps after the warm-up, increasing, in (0, 1).
        gamma: > 0.
        warmup_steps: see WithWarmup.
    """

    def __init__(self, *, milestones: Sequence[float], gamma: float, warmup_steps: int) -> None:
        super().__init__(warmup_steps=warmup_steps)
        check_range("trainer.scheduler", "(0, inf)", gamma=gamma)
        for milestone in milestones:
            check_range("trainer.scheduler", "(0, 1)", milestones=milestone)
        if not milestones or sorted({*milestones}) != list(milestones):
            raise UserError(
                f"trainer.scheduler.milestones: found {list(milestones)}, expected increasing shares of the run, such "
                "as [0.5, 0.75]."
            )
        self.milestones, self.gamma = list(milestones), gamma

    def after(self, t: float) -> float:
        return self.gamma ** sum(t >= milestone for milestone in self.milestones)


class OneCycle(Schedule):
    """Up from 1/start to 1, then down to 1/(start * end), both along cosines (Smith and Topin, arXiv:1708.07120).

    As torch's OneCycleLR with its defaults, but without the cycle of the momentum.

    Args:
        rise: share of the run in which the rate rises, in (0, 1).
        start: the first factor is 1/start, >= 1.
        end: the last factor is 1/(start * end), >= 1.
    """

    def __init__(self, *, rise: float, start: float, end: float) -> None:
        check_range("trainer.scheduler", "(0, 1)", rise=rise)
        check_range("trainer.scheduler", "[1, inf)", start=start, end=end)
        self.rise, self.start, self.end = rise, start, end

    def factor(self, step: int, steps: int) -> float:
        top, last = self.rise * steps - 1, steps - 1  # the last step is the lowest point, as in torch
        if step <= top:
            return _between(1 / self.start, 1.0, step / top)
        return _between(1.0, 1 / (self.start * self.end), (step - top) / (last - top))

    def check(self, steps: int) -> None:
        if self.rise * steps <= 1:
            raise UserError(
                f"trainer.scheduler.rise={self.rise}: with trainer.steps={steps} the rate would rise in less than one "
                "step. Set it higher."
            )


def _between(first: float, last: float, share: float) -> float:
    """From `first` to `last` along half a cosine."""
    return last + (first - last) * (1 + cos(pi * share)) / 2


def build_scheduler(scheduler: Schedule | Scheduler, optimizer: Optimizer, steps: int) -> LRScheduler:
    """torch's scheduler, ready for step 0. scheduler: a schedule, or a function that makes a scheduler of torch."""
    if isinstance(scheduler, Schedule):
        return LambdaLR(optimizer, lambda step: scheduler.factor(min(step, steps - 1), steps))
    return scheduler(optimizer)
