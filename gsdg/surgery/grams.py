"""The two passes over G [D, P]: Gram matrices of the parts, and the update as weighted sums of the parts' rows.

These torch functions are the definition. They work on strided views of G, copy nothing of size P, and use no matrix
multiplication of torch (a batched [D, L] x [L, D] product with D of 1 to 6 runs 20 to 50 times slower than the
bandwidth allows on a CPU, and TF32 or bf16 settings would reach into it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.surgery.partition import Table

LONG = 8192  # elements; from here on a dot product per pair costs less than products written out and summed


def part_grams(G: Tensor, table: Table) -> Tensor:
    """G [D, P] float32 or float64 -> [K, D, D] float64 (float32 on MPS, which has no wider), every part's Gram matrix.

    Accumulated in the type of G within a slot, in float64 across slots.
    """
    D = len(G)
    slots = G.new_empty(len(table.slot_part), D, D)
    for start, count, length, first in table.blocks:
        view = G[:, start : start + count * length].view(D, count, length)
        gram = _gram_by_dots if length >= LONG and G.device.type == "cpu" else _gram_by_products
        slots[first : first + count] = gram(view)
    wide = torch.float32 if G.device.type == "mps" else torch.float64
    grams = slots.new_zeros(table.n_parts, D, D, dtype=wide)
    return grams.index_add_(0, table.slot_part, slots.to(wide))


def _gram_by_products(view: Tensor) -> Tensor:
    """[D, q, L] -> [q, D, D]: one multiplication and one sum for all pairs."""
    return (view[:, None] * view).sum(-1).permute(2, 0, 1)


def _gram_by_dots(view: Tensor) -> Tensor:
    """[D, q, L] -> [q, D, D]: a slot's D rows stay in cache while its pairs are multiplied; no product is stored."""
    D = len(view)
    dots = []
    for slot in view.unbind(1):
        rows = slot.unbind(0)
        dots += [torch.dot(rows[i], rows[j]) for i in range(D) for j in range(i, D)]
    upper, columns = torch.triu_indices(D, D)
    grams = view.new_empty(view.shape[1], D, D)
    grams[:, upper, columns] = grams[:, columns, upper] = torch.stack(dots).view(view.shape[1], -1)
    return grams


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
    return out
