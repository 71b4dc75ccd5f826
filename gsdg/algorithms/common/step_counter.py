"""A count of the steps that were made, for what depends on it: a penalty that waits, players that take turns."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer


class Steps(nn.Module):
    """Counted on the host, where nothing has to wait for the number, and saved with the weights."""

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
