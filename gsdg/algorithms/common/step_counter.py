"""A counter of training steps, for behaviour that depends on the step: an annealed penalty, alternating updates."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer


class StepCounter(nn.Module):
    """Makes optimizer steps and counts them.

    The count `done` is a Python int, so that reading it never synchronizes with the device. It is saved in the
    checkpoint as the extra state of this module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done = 0

    def step(self, optimizer: Optimizer) -> None:
        optimizer.step()
        self.done += 1

    def get_extra_state(self) -> dict:
        return {"done": self.done}

    def set_extra_state(self, state: dict) -> None:
        self.done = int(state["done"])
