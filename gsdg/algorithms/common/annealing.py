"""An annealed penalty: its weight is `before` during the first `steps` training steps, and `after` from then on.

When the weight changes, the optimizer state is reset, as in DomainBed: Adam's running averages come from gradients of
another size, and with them the first steps on the changed loss would be too large.
"""

from __future__ import annotations

from torch.optim import Optimizer

from gsdg.algorithms.common.step_counter import StepCounter
from gsdg.utils.errors import check_range


class Annealing(StepCounter):
    """The penalty's weight at the current step, and the optimizer steps that advance it.

    Args:
        steps: number of training steps with the weight `before`, at least 0.
        before: weight of the penalty during these steps.
        after: weight of the penalty from then on.
    """

    def __init__(self, *, steps: int, before: float, after: float) -> None:
        super().__init__()
        check_range("algorithm", "[0, inf)", anneal_steps=steps)
        self.steps, self.before, self.after = steps, before, after

    @property
    def waiting(self) -> bool:
        """True while the weight is still `before`."""
        return self.done < self.steps

    @property
    def weight(self) -> float:
        """The penalty's weight in the next training step."""
        return self.before if self.waiting else self.after

    def step(self, optimizer: Optimizer) -> None:
        """Make an optimizer step; reset the optimizer state first if this is the first step with the weight `after`."""
        if self.done == self.steps:
            optimizer.state.clear()
        super().step(optimizer)
