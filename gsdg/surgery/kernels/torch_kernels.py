"""The two passes over G [D, P]: Gram matrices of the slots, and the update as weighted sums of the slots' rows.

These torch functions are the definition; `triton.py` has their CUDA twins. They work on strided views of G and copy
nothing of size P. They use no matrix product of torch: on ResNet-50's parts and 2 CPU cores torch.bmm took 50 times as
long; torch.mv took as long, with a relative error of 2e-5 on a million elements; and all compute in bf16 or TF32 where
a user has allowed that for matrix products.
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

from gsdg.surgery.table import BLOCK, Table

log = logging.getLogger(__name__)
DEVICE_ERRORS = ("CUDA error", "HIP error", "Triton Error [")  # so torch's and Triton's RuntimeErrors say
RUN = 1024  # elements; a norm adds squares one by one, and loses digits in longer runs


def kernels(G: Tensor) -> ModuleType:
    """Where `slot_grams` and `combine` come from: `triton.py` on CUDA, if it is there, can build its kernels and
    D <= 8; else this module.

    GSDG_TRITON=0 in the environment keeps to this module.
    """
    wanted = G.is_cuda and len(G) <= 8 and os.environ.get("GSDG_TRITON") != "0"
    if wanted and _triton_twins() and _builds(len(G), G.dtype, G.device):
        return _triton_twins()
    return sys.modules[__name__]


@cache
def _triton_twins() -> ModuleType | None:
    try:
        from gsdg.surgery import triton as twins
    except ImportError as error:
        log.info("no triton (%s): gradient surgery takes the torch path, with more kernel launches", error)
        return None
    return twins


@cache
def _builds(D: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Triton can build the kernels for G [D, P] of this dtype on this device, tried once.

    It needs a C compiler, Python's headers and a folder to write to, which slim images lack. An error of the device,
    memory that ran out or an illegal access by an earlier kernel, has nothing to do with building, and is raised.
    """
    try:
        _triton_twins().build(D, dtype, device)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in DEVICE_ERRORS):
            raise
        _warn_of_torch_path(f"{type(error).__name__}: {error}")
        return False
    return True


@cache
def _warn_of_torch_path(reason: str) -> None:
    log.warning(
        "Triton cannot build its kernels (%s): gradient surgery takes the torch path, with more kernel launches and "
        "the same results up to rounding. Install what is missing, or set GSDG_TRITON=0 to choose that path",
        reason,
    )


def part_grams(G: Tensor, table: Table) -> Tensor:
    """G [D, P] -> [K, D, D] float64 (float32 on MPS), every part's Gram matrix.

    Accumulated in float32 (float64 for a float64 G) within a slot, in float64 across slots.
    """
    return table.sums(kernels(G).slot_grams(G, table))


def slot_grams(G: Tensor, table: Table) -> Tensor:
    """G [D, P] float32, bfloat16 or float64 -> [S, D, D], every slot's Gram matrix, float32 (float64 of float64)."""
    D, dtype = len(G), accumulation_type(G)
    slots = G.new_empty(table.n_slots, D, D, dtype=dtype)
    scratch = G.new_empty(BLOCK, dtype=dtype)
    for start, count, length, first in table.blocks:
        view = G[:, start : start + count * length].view(D, count, length).to(dtype)
        slots[first : first + count] = _gram_by_pairs(view, scratch)
    for elements, numbers, length in table.gathers:
        slots[numbers] = _gram_at_once(_gathered(G, elements).to(dtype).view(D, -1, length))
    return slots


def combine(G: Tensor, weights: Tensor, table: Table, out: Tensor, finite: Tensor | None = None) -> Tensor:
    """out[p] = sum over d of weights[k, d] * G[d, p] for every element p of part k; weights [K, D], out [P].

    out is float32 (float64 of a float64 G), and so is the arithmetic. finite: 0-dim bool on the device; where it is
    False all of `out` is 0, whatever G holds. Without it a NaN in G reaches `out` under any weight, zero included.
    """
    D, dtype = len(G), accumulation_type(G)
    slot_weights = weights[table.slot_part].to(dtype).unsqueeze(-1)  # [S, D, 1]
    for start, count, length, first in table.blocks:
        stop = start + count * length
        rows = G[:, start:stop].view(D, count, length).to(dtype).unbind(0)
        factors = slot_weights[first : first + count].unbind(1)
        target = torch.mul(rows[0], factors[0], out=out[start:stop].view(count, length))
        for row, factor in zip(rows[1:], factors[1:], strict=True):
            target.addcmul_(row, factor)
    for elements, numbers, length in table.gathers:
        scaled = _gathered(G, elements).to(dtype).view(D, -1, length) * slot_weights[numbers].transpose(0, 1)
        out.index_copy_(0, elements, scaled.sum(0).flatten())
    return out if finite is None else out.masked_fill_(~finite, 0)


def accumulation_type(G: Tensor) -> torch.dtype:
    return torch.float64 if G.dtype == torch.float64 else torch.float32


def _gathered(G: Tensor, elements: Tensor) -> Tensor:
    """G[:, elements], row by row: torch's index_select would first copy all of a G whose rows are padded."""
    return torch.stack([row.index_select(0, elements) for row in G])


def _gram_at_once(view: Tensor) -> Tensor:
    """[D, q, L] -> [q, D, D]: one multiplication and one sum for all pairs."""
    return (view[:, None] * view).sum(-1).permute(2, 0, 1)


def _gram_by_pairs(view: Tensor, scratch: Tensor) -> Tensor:
    """[D, q, L] -> [q, D, D]: every pair's products go into the same scratch, which stays in cache."""
    D, q, length = view.shape
    rows, product = view.unbind(0), scratch[: q * length].view(q, length)
    inner = {(i, i): square for i, square in enumerate(_squares(view))}  # (i, j) -> [q]
    for i, j in combinations_with_replacement(range(D), 2):
        if (i, j) not in inner:
            inner[i, j] = torch.mul(rows[i], rows[j], out=product).sum(-1)
    return torch.stack([inner[min(i, j), max(i, j)] for i in range(D) for j in range(D)], dim=-1).view(q, D, D)


def _squares(view: Tensor) -> tuple[Tensor, ...]:
    """[D, q, L] -> D squared norms [q], without writing products; () where L has no divisor that makes decent runs."""
    run = math.gcd(view.shape[2], RUN)
    if run < 64:
        return ()
    return torch.linalg.vector_norm(view.unflatten(2, (-1, run)), dim=-1).square_().sum(-1).unbind(0)
