"""The two passes over G [D, P]: the Gram matrices of the slots, and the update as weighted sums of the rows of G.

These torch functions are the definition; `triton_kernels.py` has the same functions as CUDA kernels. They work on
strided views of G and copy nothing of size P. They avoid torch's matrix products: on the parts of ResNet-50 and 2 CPU
cores torch.bmm took 50 times as long; torch.mv took as long, with a relative error of 2e-5 on a million elements; and
every matrix product computes in bf16 or TF32 if the user has allowed it.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from functools import cache
from itertools import combinations_with_replacement
from types import ModuleType

import torch
from torch import Tensor

from gsdg.surgery.part_layout import BLOCK, PartLayout

log = logging.getLogger(__name__)
DEVICE_ERRORS = ("CUDA error", "HIP error", "Triton Error [")  # in the messages of torch's and Triton's RuntimeErrors
RUN = 1024  # elements; vector_norm adds squares one by one, and loses digits on longer runs


def kernels(G: Tensor) -> ModuleType:
    """The module whose `slot_grams` and `combine` to use for G [D, P].

    `triton_kernels.py` on CUDA if Triton is installed and can build the kernels; this module otherwise, and always with
    GSDG_TRITON=0 in the environment.
    """
    wanted = G.is_cuda and os.environ.get("GSDG_TRITON") != "0"
    triton = _triton_module() if wanted else None
    return triton if triton and _can_build(triton, len(G), G.dtype, G.device) else sys.modules[__name__]


@cache
def _triton_module() -> ModuleType | None:
    try:
        from gsdg.surgery.kernels import triton_kernels
    except ImportError as error:
        log.info("no triton (%s): gradient surgery takes the torch path, with more kernel launches", error)
        return None
    return triton_kernels


@cache
def _can_build(triton: ModuleType, D: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Triton can build the kernels for G [D, P] of this dtype on this device; tried once.

    The build needs a C compiler, Python's headers and a writable folder, which slim images lack. Errors of the device
    (out of memory, an illegal access by an earlier kernel) do not come from the build and are raised.
    """
    try:
        triton.compile_kernels(D, dtype, device)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in DEVICE_ERRORS):
            raise
        _warn_torch_path(f"{type(error).__name__}: {error}")
        return False
    return True


@cache
def _warn_torch_path(reason: str) -> None:
    log.warning(
        "Triton cannot build its kernels (%s): gradient surgery takes the torch path, with more kernel launches and "
        "the same results up to rounding. Install what is missing, or set GSDG_TRITON=0 to choose that path",
        reason,
    )


def part_grams(G: Tensor, layout: PartLayout) -> Tensor:
    """The Gram matrix of every part of G [D, P]: [K, D, D] float64 (float32 on MPS).

    Accumulated in float32 (in float64 for a float64 G) within a slot, in float64 across slots.
    """
    return layout.sums(kernels(G).slot_grams(G, layout))


def slot_grams(G: Tensor, layout: PartLayout) -> Tensor:
    """The Gram matrix of every slot of G [D, P]: [S, D, D] float32 (float64 for a float64 G).

    G: float32, bfloat16 or float64.
    """
    D, dtype = len(G), accumulation_type(G)
    slots = G.new_empty(layout.n_slots, D, D, dtype=dtype)
    scratch = G.new_empty(BLOCK, dtype=dtype)
    for start, count, length, first in layout.blocks:
        view = G[:, start : start + count * length].view(D, count, length).to(dtype)
        slots[first : first + count] = _gram_by_pairs(view, scratch)
    for elements, numbers, length in layout.gathers:
        slots[numbers] = _gram_at_once(_gathered(G, elements).to(dtype).view(D, -1, length))
    return slots


def combine(G: Tensor, weights: Tensor, layout: PartLayout, out: Tensor, finite: Tensor | None = None) -> Tensor:
    """Write out[p] = sum over d of weights[k, d] * G[d, p] for every element p of part k, and return out.

    Args:
        G: [D, P] float32, bfloat16 or float64.
        weights: [K, D].
        out: [P] float32 (float64 for a float64 G), which is also the dtype of the arithmetic.
        finite: 0-dim bool on the device; if False, all of `out` is 0, whatever G holds. Without it a NaN in G reaches
            `out` under any weight, including 0.
    """
    D, dtype = len(G), accumulation_type(G)
    slot_weights = weights[layout.slot_part].to(dtype).unsqueeze(-1)  # [S, D, 1]
    for start, count, length, first in layout.blocks:
        stop = start + count * length
        rows = G[:, start:stop].view(D, count, length).to(dtype).unbind(0)
        factors = slot_weights[first : first + count].unbind(1)
        target = torch.mul(rows[0], factors[0], out=out[start:stop].view(count, length))
        for row, factor in zip(rows[1:], factors[1:], strict=True):
            target.addcmul_(row, factor)
    for elements, numbers, length in layout.gathers:
        scaled = _gathered(G, elements).to(dtype).view(D, -1, length) * slot_weights[numbers].transpose(0, 1)
        out.index_copy_(0, elements, scaled.sum(0).flatten())
    return out if finite is None else out.masked_fill_(~finite, 0)


def accumulation_type(G: Tensor) -> torch.dtype:
    return torch.float64 if G.dtype == torch.float64 else torch.float32


def _gathered(G: Tensor, elements: Tensor) -> Tensor:
    """G[:, elements], row by row: one index_select on a G with padded rows would first copy all of it."""
    return torch.stack([row.index_select(0, elements) for row in G])


def _gram_at_once(view: Tensor) -> Tensor:
    """The Gram matrices [q, D, D] of view [D, q, L], by one multiplication and one sum for all pairs of domains."""
    return (view[:, None] * view).sum(-1).permute(2, 0, 1)


def _gram_by_pairs(view: Tensor, scratch: Tensor) -> Tensor:
    """The Gram matrices [q, D, D] of view [D, q, L], pair by pair: all products use one scratch that stays in cache."""
    D, q, length = view.shape
    rows, product = view.unbind(0), scratch[: q * length].view(q, length)
    inner = {(i, i): square for i, square in enumerate(_squares(view))}  # (i, j) -> [q]
    for i, j in combinations_with_replacement(range(D), 2):
        if (i, j) not in inner:
            inner[i, j] = torch.mul(rows[i], rows[j], out=product).sum(-1)
    return torch.stack([inner[min(i, j), max(i, j)] for i in range(D) for j in range(D)], dim=-1).view(q, D, D)


def _squares(view: Tensor) -> tuple[Tensor, ...]:
    """The squared norms [q] of each of D domains in view [D, q, L], computed without storing products.

    Empty if L has no divisor from 64 to RUN, by which it could be cut into runs.
    """
    run = math.gcd(view.shape[2], RUN)
    if run < 64:
        return ()
    return torch.linalg.vector_norm(view.unflatten(2, (-1, run)), dim=-1).square_().sum(-1).unbind(0)
