"""Means of an algorithm's weights, and copies of an algorithm that predict with such a mean.

Floating-point buffers, such as the running statistics of BatchNorm in train mode, are averaged like weights; of other
buffers the latest value is used. Deviation: SWA and SWAD estimate these statistics again for the mean, over one epoch
or 500 batches.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gsdg.algorithms import Algorithm


class Weights:
    """The current parameters and buffers of an algorithm by name; calling it returns them.

    It stores where they are and not the tensors, because the algorithm may replace a tensor at any step.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.locations: dict[str, tuple[dict, str]] = {}
        seen = set()
        for prefix, module in algorithm.named_modules():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in seen:  # a shared tensor has only one name
                        seen.add(id(tensor))
                        self.locations[f"{prefix}.{key}".lstrip(".")] = tensors, key

    def __call__(self) -> dict[str, Tensor]:
        return {name: tensors[key] for name, (tensors, key) in self.locations.items()}


class WeightMean:
    """A running mean of weights, in its own tensors.

    Args:
        like: weights by name, with the shapes and types of the mean's tensors.
        device: device of the mean; None: that of `like`.

    Attributes:
        n: number of steps whose weights are in the mean.
        start, end: first and last of these steps; -1 if there are none.
    """

    def __init__(self, like: dict[str, Tensor], device: torch.device | str | None = None) -> None:
        self.tensors = {name: torch.empty_like(tensor, device=device) for name, tensor in like.items()}
        self.restart()

    def restart(self) -> None:
        self.n, self.start, self.end = 0, -1, -1

    @torch.no_grad()
    def add(self, weights: dict[str, Tensor], share: float, *, start: int, end: int, n: int = 1) -> None:
        """mean <- mean + share (weights - mean); the first weights are copied.

        Args:
            weights: weights by name.
            share: their weight in the new mean, in [0, 1].
            start, end, n: first and last step of which `weights` is a mean, and how many steps it counts for.
        """
        pairs = [(mean, weights[name]) for name, mean in self.tensors.items()]
        averaged = [pair for pair in pairs if self.n and pair[0].is_floating_point()]
        copied = [pair for pair in pairs if not (self.n and pair[0].is_floating_point())]
        if averaged:
            torch._foreach_lerp_([mean for mean, _ in averaged], [new for _, new in averaged], share)
        if copied:
            torch._foreach_copy_([mean for mean, _ in copied], [new for _, new in copied])
        self.start = start if self.n == 0 else min(self.start, start)
        self.n, self.end = self.n + n, max(self.end, end)

    def on(self, device: torch.device | str) -> WeightMean:
        """A copy of the mean on a device."""
        other = WeightMean(self.tensors, device)
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self) -> dict:
        return {"n": self.n, "start": self.start, "end": self.end, "tensors": self.tensors if self.n else {}}

    def load_state_dict(self, state: dict) -> None:
        self.n, self.start, self.end = state["n"], state["start"], state["end"]
        for name, tensor in state["tensors"].items():
            self.tensors[name].copy_(tensor)


def with_mean(algorithm: Algorithm, weights: Weights, mean: WeightMean) -> Algorithm:
    """A copy of the algorithm that predicts with `mean` as its weights. The algorithm itself keeps its own weights.

    The modules are copied, with the mean's tensors as parameters and buffers. The other attributes of an algorithm, and
    of algorithms inside it, are shared with the copy: they may be as large as the model.
    """
    # The memo of deepcopy: every tensor is replaced by the mean's ...
    memo: dict[int, object] = {}
    for name, tensor in weights().items():
        value = mean.tensors[name].to(tensor.device)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    # ... and every algorithm by a new object, which then gets copies of the modules and all other attributes as they
    # are.
    originals = [module for module in algorithm.modules() if isinstance(module, Algorithm)]
    copies = {id(original): object.__new__(type(original)) for original in originals}
    memo |= copies
    for original in originals:
        copied = {key: copy.deepcopy(original.__dict__[key], memo) for key in ("_modules", "_parameters", "_buffers")}
        copies[id(original)].__dict__.update(original.__dict__ | copied)
    return copies[id(algorithm)]
