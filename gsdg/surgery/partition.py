"""Granularity -> a table of parts on the flat parameter axis.

The flat axis holds every parameter tensor, flattened, one after the other: P elements in all. A *part* is what a
rule operates on as one vector. A *slot* is a run of neighbouring elements of one part: all of it, or a piece of at
most `SLOT` elements where the part is longer (bounded pieces keep float32 sums short). A *block* is a run of
neighbouring slots of one length: a strided view [D, count, length] of G, without a copy. A *gather* is all the slots of
one length that lie in blocks too small to be worth a call each (biases, norm scales, last chunks): they are copied.

Source: `torch.chunk(n_parts)` along dim 0 of each tensor, as the GradSurgery release cuts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gsdg.errors import UserError, listing

Layers = Literal["all", "weights"]

SLOT = 2**18  # elements; one float32 slot of three domains is 3 MB
BLOCK = 2**20  # elements; a block stays in a last-level cache between the passes over it
SMALL = 2**14  # elements; below, a block's calls cost more than its arithmetic


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
    """Where the parts lie. The first `n_operated` parts go through the rule; later parts are only reduced."""

    size: int  # P, elements on the flat axis
    blocks: tuple[Block, ...]
    gathers: tuple[Gather, ...]
    slot_part: Tensor  # [S] int64: the part of each slot
    part_tensor: Tensor  # [K] int64: the parameter tensor of each part
    n_operated: int
    n_tensors: int

    @property
    def n_parts(self) -> int:
        return len(self.part_tensor)


class Chunk:
    """Every tensor cut along dim 0 into chunks of ceil(C / n_parts) rows: at most n_parts, the last may be short.

    A tensor without a second dimension has rows of one element; a 0-dim tensor is one row. With `layers="weights"`
    tensors of fewer than two dimensions (biases, norm scales) are not operated on: their gradients are reduced over
    the domains (the release keeps the last domain's gradient there instead, and loses the others).
    """

    def __init__(self, n_parts: int = 10, *, layers: Layers = "all") -> None:
        if isinstance(n_parts, bool) or not isinstance(n_parts, int) or n_parts < 1:
            raise UserError(f"n_parts is {n_parts!r}; it is the number of chunks a tensor is cut into, an integer >= 1")
        if layers not in get_args(Layers):
            raise UserError(f"layers is {layers!r}; valid: {listing(get_args(Layers))}")
        self.n_parts = n_parts
        self.layers = layers

    def table(self, shapes: Sequence[torch.Size], device: torch.device | str = "cpu") -> Table:
        """The parts of tensors of these shapes, in this order; the index tensors lie on `device`."""
        operated = [self.layers == "all" or len(shape) >= 2 for shape in shapes]
        starts = _starts(shapes)
        blocks, slot_part, part_tensor = [], [], []
        for wanted in (True, False):  # operated tensors first, so that their parts are [0, n_operated)
            for tensor in (t for t, is_operated in enumerate(operated) if is_operated is wanted):
                for start, length in _chunks(shapes[tensor], self.n_parts):
                    part = len(part_tensor)
                    part_tensor.append(tensor)
                    for offset, slot_length in _slots(length):
                        _append(blocks, start + starts[tensor] + offset, slot_length, len(slot_part))
                        slot_part.append(part)
            if wanted:
                n_operated = len(part_tensor)
        index = [torch.tensor(i, dtype=torch.int64, device=device) for i in (slot_part, part_tensor)]
        large = tuple(block for block in blocks if block.count * block.length >= SMALL)
        gathers = _gathers([block for block in blocks if block.count * block.length < SMALL], device)
        return Table(starts[-1], large, gathers, *index, n_operated=n_operated, n_tensors=len(shapes))


def _starts(shapes: Sequence[torch.Size]) -> list[int]:
    """Where each tensor begins on the flat axis, and at the end P."""
    starts = [0]
    for shape in shapes:
        starts.append(starts[-1] + torch.Size(shape).numel())
    return starts


def _chunks(shape: Sequence[int], n_parts: int) -> Iterator[tuple[int, int]]:
    """(start, length) in elements of each chunk of one tensor."""
    size = torch.Size(shape).numel()
    rows = shape[0] if len(shape) else 1
    if size:
        step = -(-rows // n_parts) * (size // rows)
        for start in range(0, size, step):
            yield start, min(step, size - start)


def _slots(length: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the pieces of at most SLOT elements of one part."""
    for offset in range(0, length, SLOT):
        yield offset, min(SLOT, length - offset)


def _append(blocks: list[Block], start: int, length: int, slot: int) -> None:
    """Lengthen the last block by this slot if it follows on it, has its length and there is room; else open a block."""
    if blocks:
        last = blocks[-1]
        follows = start == last.start + last.count * last.length and length == last.length
        if follows and (last.count + 1) * length <= BLOCK:
            blocks[-1] = last._replace(count=last.count + 1)
            return
    blocks.append(Block(start, 1, length, slot))


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
