"""A penalty that waits: its weight is `before` for the first `steps` steps, then `after`.

At the step at which it changes the optimizer forgets its moments, as in DomainBed: Adam's, made of small gradients,
would turn the jump in size into a jump of the weights.
"""

from __future__ import annotations

from torch.optim import Optimizer

from gsdg.algorithms.steps import Steps
from gsdg.errors import check_range


class Annealing(Steps):
    """before, after: weights of the penalty. steps: how many have the first."""

    def __init__(self, *, steps: int, before: float, after: float) -> None:
        super().__init__()
        check_range("algorithm", "[0, inf)", anneal_steps=steps)
        self.steps, self.before, self.after = steps, before, after

    @property
    def waiting(self) -> bool:
        return self.done < self.steps

    @property
    def weight(self) -> float:
        """Of the penalty at the step to come."""
        return self.before if self.waiting else self.after

    def step(self, optimizer: Optimizer) -> None:
        """The optimizer's step, after it has forgotten its moments where that is due."""
        if self.done == self.steps:
            optimizer.state.clear()
        super().step(optimizer)
