"""Messages about NaN and inf in a gradient: which domain and which tensor. Slow and exact; called only on failure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SCALER_HINT = (
    ". If the losses are scaled by torch.amp.GradScaler: do not scale them, give backward(losses, scaler=scaler)"
)


class NonFiniteGradient(RuntimeError):
    """A domain gradient holds NaN or inf, or its square overflows; the message names the domain and the tensor."""


def domain_name(d: int, domains: Sequence[str] | None) -> str:
    return f"domain {d}" if domains is None or d >= len(domains) else f"domain {domains[d]!r}"


def tensor_name(k: int, shapes: Sequence[torch.Size], names: Sequence[str] | None) -> str:
    return f"tensor {k} of shape {list(shapes[k])}" if names is None else f"{names[k]!r} of shape {list(shapes[k])}"


def describe_nonfinite(
    G: Tensor, shapes: Sequence[torch.Size], names: Sequence[str] | None, domains: Sequence[str] | None
) -> str | None:
    """Name the first domain and tensor whose gradient in G [D, P] is not finite; None if all are finite."""
    sizes = [shape.numel() for shape in shapes]
    for d, row in enumerate(G):
        for k, gradient in enumerate(row.split(sizes)):
            n_bad = gradient.numel() - int(gradient.isfinite().sum())
            if n_bad:
                return (
                    f"{n_bad} of {gradient.numel()} values of the gradient of {tensor_name(k, shapes, names)} from "
                    f"{domain_name(d, domains)} are NaN or inf; no update was made. Look at that domain's loss and "
                    f"images, or lower the learning rate{SCALER_HINT}"
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
    """Name a domain and tensor whose gradient is finite while its squared norm is not.

    Args:
        squares: [S, D], squared norms of pieces of the gradients; at least one is not finite.
        tensors: [S], the tensor of each piece.
        dtype: of `squares`, for the message.
    """
    s, d = (~squares.isfinite()).nonzero()[0].tolist()
    return (
        f"the squared norm of the gradient of {tensor_name(int(tensors[s]), shapes, names)} from "
        f"{domain_name(d, domains)} overflows {dtype} though every value is finite; no update was made. "
        "Scale the losses down, or use float64 parameters"
    )


class FirstNonFinite:
    """Remembers on the device where the first non-finite gradient came from, without a sync."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((3,), -1, dtype=torch.int64, device=device)  # (step, tensor, domain); -1: none

    def note(self, squares: Tensor, tensors: Tensor, step: int | Tensor) -> Tensor:
        """Keep step, tensor and domain of the first squared norm that is not finite, unless one was kept before.

        Args:
            squares: [S, D], squared norms of pieces of the gradients. tensors: [S], the tensor of each piece.
        Returns: 0-dim bool, whether all are finite.
        """
        bad = ~squares.isfinite().flatten()
        finite, position = ~bad.any(), bad.to(torch.uint8).argmax()
        tensor = tensors.take(position // squares.shape[1])
        place = torch.stack((torch.zeros_like(position) + step, tensor, position % squares.shape[1]))
        self._first = torch.where(finite | (self._first[0] >= 0), self._first, place)
        return finite

    def describe(
        self, shapes: Sequence[torch.Size], names: Sequence[str] | None, domains: Sequence[str] | None
    ) -> str | None:
        """The message about the first non-finite gradient; None if all were finite. Waits for the device."""
        step, tensor, domain = self._first.tolist()
        if step < 0:
            return None
        return (
            f"the gradient of {tensor_name(tensor, shapes, names)} from {domain_name(domain, domains)} held NaN or "
            f"inf, or its square overflowed, at step {step + 1}; zeros went to the optimizer in its place. Look at "
            f"that domain's loss and images, or lower the learning rate{SCALER_HINT}"
        )
