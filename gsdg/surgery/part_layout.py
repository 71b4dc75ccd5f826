"""The layout of the parts: where each part lies on the flat parameter axis, and how the kernels read it.

The flat axis holds every parameter tensor, flattened, one after the other: P elements in total. Three terms:

- A *part* is the unit that the rule treats as one vector, such as one chunk of a weight.
- A *slot* is a contiguous run of elements of one part and one tensor, at most `SLOT` long (`SLOT_ACCELERATOR` on an
  accelerator). Bounded slots keep float32 sums short and the load of a GPU's multiprocessors even. The Gram matrix of a
  part is the sum of the Gram matrices of its slots.
- The torch kernels read slots of equal length together. A *block* is a run of adjacent slots of equal length: a strided
  view [D, count, length] of G, without a copy. Blocks of fewer than `SMALL` elements (biases, norm scales, last chunks)
  are not worth a kernel launch each: their slots are copied together, as one *gather* per slot length.

The Triton kernels need neither blocks nor gathers: they read `slot_start` and `slot_length`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SLOT = 2**18  # elements; one float32 slot of three domains is 3 MB
SLOT_ACCELERATOR = 2**14  # elements; ResNet-50 has about 1,500 slots of this length
BLOCK = 2**20  # elements; a block stays in the last-level cache between the passes over it
SMALL = 2**14  # elements; reading a smaller block costs more in launches than in arithmetic


class Piece(NamedTuple):
    """`length` adjacent elements of one tensor that belong to one part; `start` is a position on the flat axis."""

    part: int
    tensor: int
    start: int
    length: int


class Block(NamedTuple):
    """`count` adjacent slots of `length` elements each: slots `first`, `first` + 1, .., from element `start` on."""

    start: int
    count: int
    length: int
    first: int


class Gather(NamedTuple):
    """Scattered slots of one length: their elements' positions [count * length] and their slot numbers [count]."""

    elements: Tensor
    slots: Tensor
    length: int


@dataclass(frozen=True)
class PartLayout:
    """The layout of K parts in S slots. The rule combines parts 0 to n_operated - 1; later parts are only reduced.

    A *unit* is the vector whose norms are compared for outliers: a tensor, or a part where parts span several tensors.
    """

    size: int  # P, elements on the flat axis
    n_operated: int
    blocks: tuple[Block, ...]
    gathers: tuple[Gather, ...]
    slot_start: Tensor  # [S] int64, position on the flat axis
    slot_length: Tensor  # [S] int64
    slot_part: Tensor  # [S] int64
    slot_tensor: Tensor  # [S] int64
    part_slots: Tensor  # [K, m] int64: the slots of each part, padded with S
    part_unit: Tensor  # [K] int64
    unit_parts: Tensor  # [U, m'] int64: the operated parts of each unit, padded with n_operated

    @property
    def n_slots(self) -> int:
        return len(self.slot_part)

    @property
    def n_parts(self) -> int:
        return len(self.part_slots)

    def sums(self, slots: Tensor) -> Tensor:
        """Sum slots [S, D, D] of any dtype over each part: [K, D, D] float64 (float32 on MPS)."""
        return group_sums(slots.to(wide_type(slots.device)), self.part_slots)

    def unit_sums(self, values: Tensor) -> Tensor:
        """Sum values [n_operated, ...] of the operated parts over each unit: [U, ...]."""
        return group_sums(values, self.unit_parts)


def wide_type(device: torch.device) -> torch.dtype:
    """The dtype of the algebra on D x D matrices: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def group_sums(values: Tensor, members: Tensor) -> Tensor:
    """Sum values [n, ...] over each group: members [groups, m] holds positions in values, padded with n.

    Returns: [groups, ...]. A gather and a sum in a fixed order: deterministic on every device, unlike index_add_.
    """
    padded = torch.cat((values, values.new_zeros(1, *values.shape[1:])))
    return padded[members].sum(1)


def build_layout(
    pieces: Iterable[Piece], size: int, n_operated: int, units: Sequence[int], device: torch.device | str
) -> PartLayout:
    """The layout of these pieces.

    Args:
        pieces: one or more per part; those of one part in the order of the flat axis.
        size: P, elements on the flat axis.
        n_operated: how many of the parts the rule combines; they are numbered first.
        units: the unit of each part.
        device: where the index tensors are placed.
    """
    # Cut every piece into slots of bounded length.
    longest = SLOT if torch.device(device).type == "cpu" else SLOT_ACCELERATOR
    slots = [
        Piece(part, tensor, start + offset, min(longest, length - offset))
        for part, tensor, start, length in pieces
        for offset in range(0, length, longest)
    ]
    slot_part, slot_tensor, slot_start, slot_length = (
        torch.tensor(slots, dtype=torch.int64, device=device).view(-1, 4).t().contiguous()
    )
    # Decide how the torch kernels read the slots: large blocks as views, all others by gathers.
    blocks = _blocks(slots)
    large = [block for block in blocks if block.count * block.length >= SMALL]
    small = [block for block in blocks if block.count * block.length < SMALL]
    return PartLayout(
        size,
        n_operated,
        blocks=tuple(large),
        gathers=_gathers(small, device),
        slot_start=slot_start,
        slot_length=slot_length,
        slot_part=slot_part,
        slot_tensor=slot_tensor,
        part_slots=members([slot.part for slot in slots], len(units), device),
        part_unit=torch.tensor(units, dtype=torch.int64, device=device),
        unit_parts=members(units[:n_operated], max(units, default=-1) + 1, device),
    )


def _blocks(slots: Sequence[Piece]) -> list[Block]:
    """Join adjacent slots of equal length into blocks of at most BLOCK elements."""
    blocks: list[Block] = []
    for number, (_, _, start, length) in enumerate(slots):
        last = blocks[-1] if blocks else None
        adjacent = last and start == last.start + last.count * last.length and length == last.length
        if adjacent and (last.count + 1) * length <= BLOCK:
            blocks[-1] = last._replace(count=last.count + 1)
        else:
            blocks.append(Block(start, 1, length, number))
    return blocks


def _gathers(blocks: Sequence[Block], device: torch.device | str) -> tuple[Gather, ...]:
    """Collect the slots of these blocks by length, at most BLOCK elements per gather.

    Example: slots 0 and 5 have 2 elements each and start at elements 0 and 7. They become one gather with
    elements = [0, 1, 7, 8], slots = [0, 5], length = 2.
    """
    slots_by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)  # length -> (start, slot number) of each slot
    for start, count, length, first in blocks:
        slots_by_length[length] += [(start + i * length, first + i) for i in range(count)]
    gathers = []
    for length, slots in slots_by_length.items():
        for group in torch.tensor(slots, device=device).split(max(1, BLOCK // length)):
            starts, numbers = group.unbind(1)
            elements = starts[:, None] + torch.arange(length, device=device)  # [count, length]
            gathers.append(Gather(elements.flatten(), numbers.contiguous(), length))
    return tuple(gathers)


def members(labels: Sequence[int], n_groups: int, device: torch.device | str) -> Tensor:
    """The positions of each label in `labels`, in ascending order: [n_groups, m] int64, padded with len(labels)."""
    groups: list[list[int]] = [[] for _ in range(n_groups)]
    for position, label in enumerate(labels):
        groups[label].append(position)
    most = max(map(len, groups), default=0)
    padded = [group + [len(labels)] * (most - len(group)) for group in groups]
    return torch.tensor(padded, dtype=torch.int64, device=device).view(n_groups, most)
