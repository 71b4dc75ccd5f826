"""Gradients at perturbed weights: the model's weights are changed in place, used, and restored."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def restored_afterwards(model: nn.Module, weights: Sequence[Tensor]) -> Generator[None]:
    """Inside the context `weights` may be changed in place; afterwards they have their old values, bit for bit.

    The values are restored from a copy, because subtracting what was added would leave rounding errors.
    BatchNorm layers do not update their running statistics inside, which should belong to the unperturbed weights.

    Args:
        model: the model whose forward passes run inside the context.
        weights: some or all parameters of the model.
    """
    saved = [weight.detach().clone() for weight in weights]
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
        with torch.no_grad():
            torch._foreach_copy_(list(weights), saved)


def parameters_with_gradient(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The model's parameters whose `.grad` is not None, and these gradients."""
    pairs: list[tuple[Tensor, Tensor]] = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    return [p for p, _ in pairs], [gradient for _, gradient in pairs]
