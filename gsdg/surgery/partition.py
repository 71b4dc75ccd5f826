"""Granularity: what one part is. Partitions from `filter` up are groups of rows (index 0 of a parameter tensor).

    model    everything is one part
    groups   one part a name pattern
    module   one part a module: its weight and its bias together
    tensor   one part a parameter tensor
    chunk    every tensor cut along dim 0 into n_parts chunks: the paper's
    filter   one part a row: an output filter of a convolution, an output unit of a linear layer
    element  one part a number; never tabulated, see `elements.py`

A tensor without a second dimension has rows of one element; a 0-dim tensor is one row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Literal

import torch

from gsdg.errors import UserError, check_literal, listing
from gsdg.surgery.table import Piece, Table, build

Layers = Literal["all", "weights"]


class Partition(ABC):
    """layers: "all", or "weights": tensors of fewer than two dimensions (biases, norm scales) are not operated on,
    their gradients are reduced over the domains (the release keeps the last domain's there, and loses the others)."""

    spans_tensors = False  # whether a part may be more than one tensor

    def __init__(self, *, layers: Layers = "all") -> None:
        check_literal("layers", layers, Layers)
        self.layers = layers

    @abstractmethod
    def cut(self, tensor: int, name: str, n_rows: int) -> Iterator[tuple[Hashable, int]]:
        """(part, number of rows) from the first row of a tensor to its last; parts of the same key are one."""

    def check(self, names: Sequence[str] | None) -> None:
        """Refuse parameters that this granularity cannot cut."""

    def operates_on(self, shape: Sequence[int]) -> bool:
        return self.layers == "all" or len(shape) >= 2

    def table(
        self, shapes: Sequence[torch.Size], device: torch.device | str = "cpu", names: Sequence[str] | None = None
    ) -> Table:
        """The parts of tensors of these shapes and names, in this order; the index tensors lie on `device`."""
        self.check(names)
        numbers: dict[Hashable, int] = {}  # part key -> its number; operated parts first
        pieces, tensor_of = [], []
        starts = [0, *accumulate(torch.Size(shape).numel() for shape in shapes)]
        for operated in (True, False):
            for tensor in (t for t, shape in enumerate(shapes) if self.operates_on(shape) is operated):
                n_rows, row = rows_of(shapes[tensor])
                cuts = self.cut(tensor, names[tensor] if names else "", n_rows) if operated else [((), n_rows)]
                start = starts[tensor]
                for key, count in cuts if row else ():
                    part = numbers.setdefault(key if operated else ("reduced", tensor), len(numbers))
                    tensor_of += [tensor] * (part == len(tensor_of))
                    pieces.append(Piece(part, tensor, start, count * row))
                    start += count * row
            if operated:
                n_operated = len(numbers)
        units = range(len(numbers)) if self.spans_tensors else tensor_of
        return build(pieces, starts[-1], n_operated, units, device)


class WholeModel(Partition):
    """One part. What PCGrad, MGDA, CAGrad and most others compare."""

    spans_tensors = True

    def cut(self, tensor: int, name: str, n_rows: int) -> Iterator[tuple[Hashable, int]]:
        yield "model", n_rows


class Groups(Partition):
    """One part a pattern: the tensors whose names match it and no pattern before it; what no pattern matches is one
    more part. Patterns are the shell's: `*layer4*`, `*.bias`, `classifier.[0-9]*`."""

    spans_tensors = True

    def __init__(self, patterns: Sequence[str], *, layers: Layers = "all") -> None:
        super().__init__(layers=layers)
        if isinstance(patterns, str) or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise UserError(f"patterns is {patterns!r}; give a list of one or more name patterns, such as ['*layer4*']")
        self.patterns = list(patterns)

    def check(self, names: Sequence[str] | None) -> None:
        _need_names(names, "groups")
        taken = {self._group(name) for name in names}
        for k, pattern in enumerate(self.patterns):
            if k not in taken:
                matched = [name for name in names if fnmatchcase(name, pattern)]
                why = "patterns before it take all that it matches" if matched else "it matches no parameter"
                raise UserError(f"pattern {pattern!r} makes an empty group: {why}; the parameters are {listing(names)}")

    def cut(self, tensor: int, name: str, n_rows: int) -> Iterator[tuple[Hashable, int]]:
        yield self._group(name), n_rows

    def _group(self, name: str) -> int:
        matching = (k for k, pattern in enumerate(self.patterns) if fnmatchcase(name, pattern))
        return next(matching, len(self.patterns))


class PerModule(Partition):
    """One part a module: the parameters whose names differ in the last word only."""

    spans_tensors = True

    def check(self, names: Sequence[str] | None) -> None:
        _need_names(names, "module")

    def cut(self, tensor: int, name: str, n_rows: int) -> Iterator[tuple[Hashable, int]]:
        yield module_of(name), n_rows


class PerTensor(Partition):
    """One part a parameter tensor."""

    def cut(self, tensor: int, name: str, n_rows: int) -> Iterator[tuple[Hashable, int]]:
        yield tensor, n_rows


class Chunk(Partition):
    """Every tensor cut along dim 0 into chunks of ceil(C / n_parts) rows: at most n_parts, the last may be short.

    Source: `torch.chunk(n_parts)`, as the GradSurgery release cuts.
    """

    def __init__(self, n_parts: int = 10, *, layers: Layers = "all") -> None:
        super().__init__(layers=layers)
        if isinstance(n_parts, bool) or not isinstance(n_parts, int) or n_parts < 1:
            raise UserError(f"n_parts is {n_parts!r}; it is the number of chunks a tensor is cut into, an integer >= 1")
        self.n_parts = n_parts

    def cut(self, tensor: int, name: str, n_rows: int) -> Iterator[tuple[Hashable, int]]:
        step = -(-n_rows // self.n_parts)
        for first in range(0, n_rows, step):
            yield (tensor, first), min(step, n_rows - first)


class PerFilter(Partition):
    """One part a row."""

    def cut(self, tensor: int, name: str, n_rows: int) -> Iterator[tuple[Hashable, int]]:
        for row in range(n_rows):
            yield (tensor, row), 1


class PerElement(Partition):
    """One part a number: the granularity of the sign rules. A Gram rule works on D x D numbers for each."""

    def cut(self, tensor: int, name: str, n_rows: int) -> Iterator[tuple[Hashable, int]]:
        raise NotImplementedError("elements are not tabulated: see gsdg/surgery/elements.py")


def part_of_rows(partition: Partition, shapes: Sequence[torch.Size], names: Sequence[str]) -> list[int]:
    """The part of every row of every tensor, numbered in order of appearance; all layers are cut."""
    numbers: dict[Hashable, int] = {}
    parts = []
    for tensor, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        n_rows, row = rows_of(shape)
        for key, count in partition.cut(tensor, name, n_rows) if row else ():
            parts += [numbers.setdefault(key, len(numbers))] * count
    return parts


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """(number of rows, elements a row) of a tensor; a row has 0 elements if the tensor has none."""
    size = torch.Size(shape).numel()
    n_rows = shape[0] if len(shape) else 1
    return n_rows, size // n_rows if size else 0


def module_of(name: str) -> str:
    """`layer1.0.conv1.weight` -> `layer1.0.conv1`; a parameter of the model itself -> `model`."""
    return name.rpartition(".")[0] or "model"


def _need_names(names: Sequence[str] | None, granularity: str) -> None:
    if names is None:
        raise UserError(
            f"granularity {granularity!r} goes by the parameters' names, and none were given; pass names="
            "[name for name, _ in model.named_parameters()]"
        )
