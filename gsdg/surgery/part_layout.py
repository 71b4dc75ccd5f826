"""The table of parts on the flat parameter axis: where the slots lie and which part each belongs to.

The flat axis holds every parameter tensor, flattened, one after the other: P elements in all. A *part* is what a
rule operates on as one vector. A *slot* is a run of neighbouring elements of one part and one tensor, at most `SLOT`
(on an accelerator `SLOT_ACCELERATOR`) of them: bounded pieces keep float32 sums short and a GPU's processors equally
busy. A part's Gram matrix is the sum of its slots'.

For the torch path a *block* is a run of neighbouring slots of one length: a strided view [D, count, length] of G,
without a copy; a *gather* is all the slots of one length that lie in blocks too small to be worth a call each (biases,
norm scales, last chunks): they are copied. The Triton kernels read `slot_start` and `slot_length` instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SLOT = 2**18  # elements; one float32 slot of three domains is 3 MB
SLOT_ACCELERATOR = 2**14  # elements; some 1,500 slots of this length are ResNet-50
BLOCK = 2**20  # elements; a block stays in a last-level cache between the passes over it
SMALL = 2**14  # elements; below, a block's calls cost more than its arithmetic


class Piece(NamedTuple):
    """`length` neighbouring elements of one tensor that belong to one part."""

    part: int
    tensor: int
    start: int
    length: int


class Block(NamedTuple):
    """`count` neighbouring slots of `length` elements each; the first begins at element `start` and is slot `first`."""

    start: int
    count: int
    length: int
    first: int


class Gather(NamedTuple):
    """Scattered slots of one length: `elements` [count * length] are their places, `slots` [count] their numbers."""

    elements: Tensor
    slots: Tensor
    length: int


@dataclass(frozen=True)
class Table:
    """Where the parts lie. The first `n_operated` parts go through the rule; later parts are only reduced.

    A *unit* is what norm outliers are looked for in: a tensor, or a part where a part is more than one tensor.
    """

    size: int  # P, elements on the flat axis
    n_operated: int
    blocks: tuple[Block, ...]
    gathers: tuple[Gather, ...]
    slot_start: Tensor  # [S] int64, on the flat axis
    slot_length: Tensor  # [S] int64
    slot_part: Tensor  # [S] int64
    slot_tensor: Tensor  # [S] int64
    part_slots: Tensor  # [K, m] int64: every part's slots, S where it has fewer than m
    part_unit: Tensor  # [K] int64
    unit_parts: Tensor  # [U, m'] int64: every unit's operated parts, n_operated where it has fewer than m'

    @property
    def n_slots(self) -> int:
        return len(self.slot_part)

    @property
    def n_parts(self) -> int:
        return len(self.part_slots)

    def sums(self, slots: Tensor) -> Tensor:
        """slots [S, D, D] of any type -> their sums over each part, [K, D, D] float64 (float32 on MPS)."""
        return group_sums(slots.to(wide_type(slots.device)), self.part_slots)

    def unit_sums(self, values: Tensor) -> Tensor:
        """values [n_operated, ...] of the operated parts -> their sums over each unit, [U, ...]."""
        return group_sums(values, self.unit_parts)


def wide_type(device: torch.device) -> torch.dtype:
    """What the algebra of D x D matrices is done in: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def group_sums(values: Tensor, members: Tensor) -> Tensor:
    """values [n, ...], members [groups, m] positions in 0..n, n for none -> sums [groups, ...].

    A gather and a sum in a fixed order: deterministic on every device, where index_add_ is not.
    """
    padded = torch.cat((values, values.new_zeros(1, *values.shape[1:])))
    return padded[members].sum(1)


def build(
    pieces: Iterable[Piece], size: int, n_operated: int, units: Sequence[int], device: torch.device | str
) -> Table:
    """The table of these pieces, one or more a part, ordered along the flat axis within each part.

    units: of each part, its unit. The index tensors lie on `device`.
    """
    longest = SLOT if torch.device(device).type == "cpu" else SLOT_ACCELERATOR
    slots = [
        Piece(part, tensor, start + offset, min(longest, length - offset))
        for part, tensor, start, length in pieces
        for offset in range(0, length, longest)
    ]
    blocks = _blocks(slots)
    columns = torch.tensor(slots, dtype=torch.int64, device=device).view(-1, 4).t().contiguous()
    return Table(
        size,
        n_operated,
        blocks=tuple(block for block in blocks if block.count * block.length >= SMALL),
        gathers=_gathers([block for block in blocks if block.count * block.length < SMALL], device),
        slot_start=columns[2],
        slot_length=columns[3],
        slot_part=columns[0],
        slot_tensor=columns[1],
        part_slots=members([slot.part for slot in slots], len(units), device),
        part_unit=torch.tensor(units, dtype=torch.int64, device=device),
        unit_parts=members(units[:n_operated], max(units, default=-1) + 1, device),
    )


def _blocks(slots: Sequence[Piece]) -> list[Block]:
    """Neighbouring slots of one length together, as long as a block has room."""
    blocks: list[Block] = []
    for number, (_, _, start, length) in enumerate(slots):
        last = blocks[-1] if blocks else None
        follows = last and start == last.start + last.count * last.length and length == last.length
        if follows and (last.count + 1) * length <= BLOCK:
            blocks[-1] = last._replace(count=last.count + 1)
        else:
            blocks.append(Block(start, 1, length, number))
    return blocks


def _gathers(blocks: Sequence[Block], device: torch.device | str) -> tuple[Gather, ...]:
    """The slots of these blocks by their length, at most BLOCK elements at a time."""
    by_length: dict[int, list[tuple[int, int]]] = {}  # length -> (start, slot) of each slot
    for start, count, length, first in blocks:
        by_length.setdefault(length, []).extend((start + i * length, first + i) for i in range(count))
    gathers = []
    for length, places in by_length.items():
        for some in torch.tensor(places, device=device).split(max(1, BLOCK // length)):
            elements = some[:, :1] + torch.arange(length, device=device)  # [count, length]
            gathers.append(Gather(elements.flatten(), some[:, 1].contiguous(), length))
    return tuple(gathers)


def members(labels: Sequence[int], n_groups: int, device: torch.device | str) -> Tensor:
    """[n_groups, m]: the positions of each label in `labels`, in order, padded with len(labels)."""
    groups: list[list[int]] = [[] for _ in range(n_groups)]
    for position, label in enumerate(labels):
        groups[label].append(position)
    most = max(map(len, groups), default=0)
    padded = [group + [len(labels)] * (most - len(group)) for group in groups]
    return torch.tensor(padded, dtype=torch.int64, device=device).view(n_groups, most)
