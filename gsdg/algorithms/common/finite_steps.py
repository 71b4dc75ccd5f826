"""Checked optimizer steps inside `Algorithm.step`. The trainer itself checks only the gradients of the first one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gsdg.algorithms.common.perturbed_weights import parameters_with_gradient
from gsdg.surgery import NonFiniteGradient


class FiniteSteps:
    """Makes optimizer steps with finite gradients only.

    On a CPU a non-finite gradient raises NonFiniteGradient. On an accelerator the check would synchronize with the
    device, so there a non-finite gradient is replaced by zeros, and `nonfinite_report` says so later.

    Args:
        sources: descriptions of the gradients that are checked, for messages; one per optimizer step that is made here
            within a training step.
        device: the device of the parameters.
    """

    def __init__(self, sources: Sequence[str], device: torch.device) -> None:
        self.sources = list(sources)
        self._sync_is_free = device.type == "cpu"
        self._first_bad = torch.full((), -1, device=device)  # index in `sources`; -1: all gradients were finite

    def step(
        self, optimizer: Optimizer, module: nn.Module, source: str, undo: Callable[[], None] | None = None
    ) -> None:
        """Make an optimizer step from the gradients of `module`.

        Args:
            source: the description of these gradients, one of `sources`.
            undo: called before NonFiniteGradient is raised, to restore the weights.
        """
        weights, gradients = parameters_with_gradient(module)
        finite = torch.nn.utils.get_total_norm(gradients).isfinite()
        if not self._sync_is_free:
            self._replace_nonfinite(weights, gradients, finite, source)
        elif not finite:
            if undo:
                undo()
            raise NonFiniteGradient(f"{source} holds NaN or inf: no optimizer step was made with it.")
        optimizer.step()

    def nonfinite_report(self) -> str:
        """Which gradient was the first to be replaced by zeros; "" if none was. Synchronizes with the device."""
        index = int(self._first_bad)
        if index < 0:
            return ""
        return f"{self.sources[index]} holds NaN or inf: the optimizer step was made with zeros instead."

    def _replace_nonfinite(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], finite: Tensor, source: str
    ) -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = torch.where(finite, gradient, 0)
        keep = finite | (self._first_bad >= 0)
        self._first_bad = torch.where(keep, self._first_bad, self.sources.index(source))
