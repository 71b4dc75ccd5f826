"""Means of an algorithm's weights, and an algorithm that has such a mean for its weights.

Buffers of floating point, such as the statistics of a BatchNorm that trains, are averaged like weights; other buffers
are the latest. Deviation: SWA and SWAD estimate those statistics anew, over an epoch or 500 batches, for the mean.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gsdg.algorithms import Algorithm


class Weights:
    """The parameters and buffers that an algorithm has now, by name; it may replace them at any step."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.places: dict[str, tuple[dict, str]] = {}
        seen = set()
        for prefix, module in algorithm.named_modules():
            for table in (module._parameters, module._buffers):
                for key, tensor in table.items():
                    if tensor is not None and id(tensor) not in seen:  # shared ones have one name
                        seen.add(id(tensor))
                        self.places[f"{prefix}.{key}".lstrip(".")] = table, key

    def __call__(self) -> dict[str, Tensor]:
        return {name: table[key] for name, (table, key) in self.places.items()}


class Mean:
    """A running mean of weights, in tensors of its own. `start`, `end`: the steps of the first and the last of them."""

    def __init__(self, like: dict[str, Tensor], device: torch.device | str | None = None) -> None:
        self.tensors = {name: torch.empty_like(tensor, device=device) for name, tensor in like.items()}
        self.restart()

    def restart(self) -> None:
        self.n, self.start, self.end = 0, -1, -1

    @torch.no_grad()
    def add(self, weights: dict[str, Tensor], share: float, *, start: int, end: int, n: int = 1) -> None:
        """mean <- mean + share (weights - mean), a share of 1 for the first; they stand for `n`, of the steps given."""
        pairs = [(mean, weights[name]) for name, mean in self.tensors.items()]
        lasting = [pair for pair in pairs if self.n and pair[0].is_floating_point()]
        taken = [pair for pair in pairs if not (self.n and pair[0].is_floating_point())]
        if lasting:
            torch._foreach_lerp_(*map(list, zip(*lasting, strict=True)), share)
        if taken:
            torch._foreach_copy_(*map(list, zip(*taken, strict=True)))
        self.start = start if self.n == 0 else min(self.start, start)
        self.n, self.end = self.n + n, max(self.end, end)

    def on(self, device: torch.device | str) -> Mean:
        """A copy of it on a device."""
        other = Mean(self.tensors, device)
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self) -> dict:
        return {"n": self.n, "start": self.start, "end": self.end, "tensors": self.tensors if self.n else {}}

    def load_state_dict(self, state: dict) -> None:
        self.n, self.start, self.end = state["n"], state["start"], state["end"]
        for name, tensor in state["tensors"].items():
            self.tensors[name].copy_(tensor)


def with_mean(algorithm: Algorithm, weights: Weights, mean: Mean) -> Algorithm:
    """The algorithm with `mean` for its weights: to predict with, while the algorithm itself keeps its own.

    Its modules are copies, whose tensors are the mean's. What is no module is shared: of an algorithm, and of one
    inside it, such as the gradients that a surgery on its losses keeps.
    """
    memo: dict[int, object] = {}
    for name, own in weights().items():
        tensor = mean.tensors[name].to(own.device)
        memo[id(own)] = nn.Parameter(tensor, requires_grad=False) if isinstance(own, nn.Parameter) else tensor
    algorithms = [module for module in algorithm.modules() if isinstance(module, Algorithm)]  # it, and any inside it
    for own in algorithms:
        memo[id(own)] = object.__new__(type(own))
    for own in algorithms:
        copied = {key: copy.deepcopy(own.__dict__[key], memo) for key in ("_modules", "_parameters", "_buffers")}
        memo[id(own)].__dict__.update(own.__dict__ | copied)
    return memo[id(algorithm)]
