"""The two passes over G [D, P]: Gram matrices of the parts, and the update as weighted sums of the parts' rows.

These torch functions are the definition. They work on strided views of G and copy nothing of size P. They use no matrix
product of torch: on ResNet-50's parts and 2 CPU cores torch.bmm took 50 times as long, torch.dot per slot and pair as
long, and both compute in bf16 or TF32 where a user has allowed that for matrix products.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from gsdg.surgery.partition import BLOCK, Table

RUN = 1024  # elements; a norm adds squares one by one, and loses digits in longer runs


def part_grams(G: Tensor, table: Table) -> Tensor:
    """G [D, P] float32 or float64 -> [K, D, D] float64 (float32 on MPS, which has no wider), every part's Gram matrix.

    Accumulated in the type of G within a slot, in float64 across slots.
    """
    D = len(G)
    slots = G.new_empty(len(table.slot_part), D, D)
    scratch = G.new_empty(BLOCK)
    for start, count, length, first in table.blocks:
        view = G[:, start : start + count * length].view(D, count, length)
        slots[first : first + count] = _gram_by_pairs(view, scratch)
    for elements, numbers, length in table.gathers:
        slots[numbers] = _gram_at_once(_gathered(G, elements).view(D, -1, length))
    wide = torch.float32 if G.device.type == "mps" else torch.float64
    grams = slots.new_zeros(table.n_parts, D, D, dtype=wide)
    return grams.index_add_(0, table.slot_part, slots.to(wide))


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


def combine(G: Tensor, weights: Tensor, table: Table, out: Tensor) -> Tensor:
    """out[p] = sum over d of weights[k, d] * G[d, p] for every element p of part k; weights [K, D], out [P].

    A NaN in G reaches `out` under any weight, zero included.
    """
    D = len(G)
    slot_weights = weights[table.slot_part].to(G.dtype).unsqueeze(-1)  # [S, D, 1]
    for start, count, length, first in table.blocks:
        stop = start + count * length
        rows = G[:, start:stop].view(D, count, length).unbind(0)
        factors = slot_weights[first : first + count].unbind(1)
        target = torch.mul(rows[0], factors[0], out=out[start:stop].view(count, length))
        for row, factor in zip(rows[1:], factors[1:], strict=True):
            target.addcmul_(row, factor)
    for elements, numbers, length in table.gathers:
        scaled = _gathered(G, elements).view(D, -1, length) * slot_weights[numbers].transpose(0, 1)
        out.index_copy_(0, elements, scaled.sum(0).flatten())
    return out
