"""Optimizer steps inside `Algorithm.step`, each on a finite gradient only. The trainer has checked the first one's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gsdg.algorithms.elsewhere import with_gradient
from gsdg.surgery import NonFiniteGradient


class FiniteSteps:
    """sources: in words, what the gradients are of; one per later step of a training step.

    On a CPU a gradient that is not finite raises. On an accelerator reading it would make the host wait: there zeros
    go to the optimizer in its place, and `blame` says so later.
    """

    def __init__(self, sources: Sequence[str], device: torch.device) -> None:
        self.sources = list(sources)
        self._reading_is_free = device.type == "cpu"
        self._first_bad = torch.full((), -1, device=device)  # position in `sources`

    def step(
        self, optimizer: Optimizer, module: nn.Module, source: str, undo: Callable[[], None] | None = None
    ) -> None:
        """The optimizer's step from the gradients of `module`. undo: called before NonFiniteGradient is raised."""
        weights, gradients = with_gradient(module)
        finite = torch.nn.utils.get_total_norm(gradients).isfinite()
        if not self._reading_is_free:
            self._replace(weights, finite, source)
        elif not finite:
            if undo:
                undo()
            raise NonFiniteGradient(f"{source} holds NaN or inf: the optimizer made no step with it.")
        optimizer.step()

    def blame(self) -> str:
        """What the first replaced gradient was of, in words; "" if none was replaced. Waits for the device."""
        k = int(self._first_bad)
        return f"{self.sources[k]} holds NaN or inf: zeros went to the optimizer in its place." if k >= 0 else ""

    def _replace(self, weights: Sequence[Tensor], finite: Tensor, source: str) -> None:
        for weight in weights:
            weight.grad = torch.where(finite, weight.grad, 0)
        known = finite | (self._first_bad >= 0)
        self._first_bad = torch.where(known, self._first_bad, self.sources.index(source))
