"""NaN and inf in a gradient: where they came from, in words. Slow and exact; called only when something is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SCALER = ". If the losses are scaled by torch.amp.GradScaler: do not scale them, give backward(losses, scaler=scaler)"


class NonFiniteGradient(RuntimeError):
    """A domain's gradient holds NaN or inf, or its square overflows; the message names the domain and the tensor."""


def domain_name(d: int, domains: Sequence[str] | None) -> str:
    return f"domain {d}" if domains is None or d >= len(domains) else f"domain {domains[d]!r}"


def tensor_name(k: int, shapes: Sequence[torch.Size], names: Sequence[str] | None) -> str:
    return f"tensor {k} of shape {list(shapes[k])}" if names is None else f"{names[k]!r} of shape {list(shapes[k])}"


def describe_nonfinite(
    G: Tensor, shapes: Sequence[torch.Size], names: Sequence[str] | None, domains: Sequence[str] | None
) -> str | None:
    """The first tensor of the first domain whose gradient, in G [D, P], is not finite; None if all are."""
    sizes = [shape.numel() for shape in shapes]
    for d, row in enumerate(G):
        for k, gradient in enumerate(row.split(sizes)):
            bad = gradient.numel() - int(gradient.isfinite().sum())
            if bad:
                return (
                    f"{bad} of {gradient.numel()} values of the gradient of {tensor_name(k, shapes, names)} from "
                    f"{domain_name(d, domains)} are NaN or inf; no update was made. Look at that domain's loss and "
                    f"images, or lower the learning rate{SCALER}"
                )
    return None


def describe_overflow(
    squares: Tensor,
    tensors: Tensor,
    shapes: Sequence[torch.Size],
    names: Sequence[str] | None,
    domains: Sequence[str] | None,
    dtype: torch.dtype,
) -> str:
    """squares [S, D] and their tensors [S]: names one that is not finite although its gradient is."""
    s, d = (~squares.isfinite()).nonzero()[0].tolist()
    return (
        f"the squared norm of the gradient of {tensor_name(int(tensors[s]), shapes, names)} from "
        f"{domain_name(d, domains)} overflows {dtype} though every value is finite; no update was made. "
        "Scale the losses down, or use float64 parameters"
    )


class FirstNonFinite:
    """Where the first non-finite gradient came from, noted on the device without reading anything there."""

    def __init__(self, device: torch.device) -> None:
        self._found = torch.full((3,), -1, dtype=torch.int64, device=device)  # step, tensor, domain

    def note(self, squares: Tensor, tensors: Tensor, step: int) -> Tensor:
        """squares [S, D], squared norms of pieces of the gradients; tensors [S], of which -> 0-dim bool: all finite."""
        bad = ~squares.isfinite().flatten()
        finite, first = ~bad.any(), bad.to(torch.uint8).argmax()
        tensor = tensors.take(first // squares.shape[1])
        found = torch.stack((torch.zeros_like(first) + step, tensor, first % squares.shape[1]))
        self._found = torch.where(finite | (self._found[0] >= 0), self._found, found)
        return finite

    def describe(
        self, shapes: Sequence[torch.Size], names: Sequence[str] | None, domains: Sequence[str] | None
    ) -> str | None:
        """In words; None if every gradient has been finite. Waits for the device."""
        step, tensor, domain = self._found.tolist()
        if step < 0:
            return None
        return (
            f"the gradient of {tensor_name(tensor, shapes, names)} from {domain_name(domain, domains)} held NaN or "
            f"inf, or its square overflowed, at step {step}; zeros went to the optimizer in its place. Look at that "
            f"domain's loss and images, or lower the learning rate{SCALER}"
        )
