"""Gradients at other weights: the model's own are moved in place, used, and put back as they were.

They are put back from a copy: to subtract what was added would leave its rounding errors in the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def elsewhere(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Inside, `weights`, some of the model's, may be moved in place; at the end they are as before, bit for bit.

    BatchNorm normalises as ever, but keeps its running statistics: they are of the weights that are evaluated.
    """
    kept = [weight.detach().clone() for weight in weights]
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
        with torch.no_grad():
            torch._foreach_copy_(weights, kept)


def with_gradient(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The model's parameters that have a gradient, and these gradients."""
    weights = [p for p in model.parameters() if p.grad is not None]
    return weights, [p.grad for p in weights]
