"""Partitions: how the parameters are split into parts (the granularity of the surgery).

    model    one part: all parameters
    groups   one part per name pattern
    module   one part per module: its weight and its bias together
    tensor   one part per parameter tensor
    chunk    every tensor is cut along dim 0 into n_parts chunks (the paper's granularity)
    filter   one part per row: an output filter of a convolution, an output unit of a linear layer
    element  one part per element; it has no layout of parts, see `elementwise.py`

A *row* of a tensor is its slice at one index of dim 0. Every partition but `element` groups whole rows. A 1-dimensional
tensor has rows of one element; a 0-dimensional tensor is one row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from itertools import accumulate
from typing import Literal

import torch

from gsdg.surgery.part_layout import PartLayout, Piece, build_layout
from gsdg.utils.errors import UserError, check_literal, listing
from gsdg.utils.name_patterns import matching

Layers = Literal["all", "weights"]


class Partition(ABC):
    """Base class of partitions.

    Args:
        layers: "all", or "weights": the rule then combines only tensors of two or more dimensions. The gradients of the
            others (biases, norm scales) are summed or averaged over the domains, as the rule reduces them. (The
            release keeps the last domain's gradient there and discards the others.)
    """

    spans_tensors = False  # whether one part may contain rows of several tensors

    def __init__(self, *, layers: Layers = "all") -> None:
        check_literal("layers", layers, Layers)
        self.layers = layers

    @abstractmethod
    def cut(self, tensor: int, name: str, n_rows: int) -> Iterator[tuple[Hashable, int]]:
        """Cut one tensor into runs of rows, from its first row to its last.

        Args:
            tensor: the tensor's number. name: its parameter name, "" where no names were given.
            n_rows: its size along dim 0.
        Yields: (key, number of rows) of each run. Runs with the same key, also of different tensors, are one part.
        """

    def check(self, names: Sequence[str] | None) -> None:
        """Raise UserError where parameters of these names cannot be cut at this granularity."""

    def operates_on(self, shape: Sequence[int]) -> bool:
        """Whether the rule combines tensors of this shape."""
        return self.layers == "all" or len(shape) >= 2

    def layout(
        self, shapes: Sequence[torch.Size], device: torch.device | str = "cpu", names: Sequence[str] | None = None
    ) -> PartLayout:
        """The layout of the parts for tensors of these shapes and names, with its index tensors on `device`.

        Tensors that the rule operates on are numbered first; every other tensor follows as one part that is only
        reduced. Three tensors under `Chunk(2, layers="weights")`:

            tensor      conv.weight [4, 3]        conv.bias [4]    head.weight [2, 5]
            flat axis   0 ...... 5 | 6 ..... 11 | 12 ........ 15 | 16 .. 20 | 21 .. 25
            part            0      |      1     |       4        |     2    |     3

        The rule combines parts 0 to 3 (n_operated = 4). Part 4, the bias, is reduced. Outliers are looked for per
        tensor: parts 0 and 1 are the unit 0, parts 2 and 3 the unit 2.
        """
        self.check(names)
        sizes = [torch.Size(shape).numel() for shape in shapes]
        starts = [0, *accumulate(sizes)]  # of each tensor on the flat axis; last: P
        filled = [tensor for tensor, size in enumerate(sizes) if size]  # a tensor without elements has no part
        # Operated tensors first: parts are numbered in the order in which their keys appear.
        numbers: dict[Hashable, int] = {}
        pieces = []
        for tensor in (t for t in filled if self.operates_on(shapes[t])):
            n_rows, row_size = rows_of(shapes[tensor])
            start = starts[tensor]
            for key, count in self.cut(tensor, names[tensor] if names else "", n_rows):
                part = numbers.setdefault(key, len(numbers))
                pieces.append(Piece(part, tensor, start, count * row_size))
                start += count * row_size
        n_operated = len(numbers)
        # Then the rest: one part per tensor.
        reduced = [t for t in filled if not self.operates_on(shapes[t])]
        pieces += [Piece(n_operated + k, t, starts[t], sizes[t]) for k, t in enumerate(reduced)]
        # Norm outliers are looked for per tensor, or per part where a part spans several tensors.
        tensor_of = {piece.part: piece.tensor for piece in reversed(pieces)}
        parts = range(n_operated + len(reduced))
        units = parts if self.spans_tensors else [tensor_of[part] for part in parts]
        return build_layout(pieces, starts[-1], n_operated, units, device)


class WholeModel(Partition):
    """One part: all parameters. The granularity of PCGrad, MGDA, CAGrad and most other methods.

    Args:
        layers: "all" or "weights" (only tensors of two or more dimensions), see `Partition`.
    """

    spans_tensors = True

    def cut(self, tensor: int, name: str, n_rows: int) -> Iterator[tuple[Hashable, int]]:
        yield "model", n_rows


class Groups(Partition):
    """One part per name pattern: the tensors whose names match it and no earlier pattern.

    Tensors that match no pattern are one more part.

    Args:
        patterns: one or more shell patterns on parameter names: `*layer4*`, `*.bias`, `classifier.[0-9]*`. UserError
            for a pattern whose group is empty.
        layers: "all" or "weights" (only tensors of two or more dimensions), see `Partition`.
    """

    spans_tensors = True

    def __init__(self, patterns: Sequence[str], *, layers: Layers = "all") -> None:
        super().__init__(layers=layers)
        if isinstance(patterns, str) or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise UserError(f"patterns is {patterns!r}; give a list of one or more name patterns, such as ['*layer4*']")
        self.patterns = list(patterns)

    def check(self, names: Sequence[str] | None) -> None:
        names = _require_names(names, "groups")
        filled_groups = {self._group(name) for name in names}
        for k, pattern in enumerate(self.patterns):
            if k not in filled_groups:
                taken = matching(pattern, names)
                why = "earlier patterns match all of its parameters" if taken else "it matches no parameter"
                raise UserError(f"pattern {pattern!r} makes an empty group: {why}; the parameters are {listing(names)}")

    def cut(self, tensor: int, name: str, n_rows: int) -> Iterator[tuple[Hashable, int]]:
        yield self._group(name), n_rows

    def _group(self, name: str) -> int:
        """The number of the first pattern that matches; the number of patterns where none does."""
        groups = (k for k, pattern in enumerate(self.patterns) if matching(pattern, [name]))
        return next(groups, len(self.patterns))


class PerModule(Partition):
    """One part per module: the parameters whose names differ only after the last dot.

    Args:
        layers: "all" or "weights" (only tensors of two or more dimensions), see `Partition`.
    """

    spans_tensors = True

    def check(self, names: Sequence[str] | None) -> None:
        _require_names(names, "module")

    def cut(self, tensor: int, name: str, n_rows: int) -> Iterator[tuple[Hashable, int]]:
        yield module_of(name), n_rows


class PerTensor(Partition):
    """One part per parameter tensor.

    Args:
        layers: "all" or "weights" (only tensors of two or more dimensions), see `Partition`.
    """

    def cut(self, tensor: int, name: str, n_rows: int) -> Iterator[tuple[Hashable, int]]:
        yield tensor, n_rows


class Chunk(Partition):
    """Every tensor is cut along dim 0 into at most n_parts chunks of ceil(C / n_parts) rows; the last may be shorter.

    Source: `torch.chunk(n_parts)`, as the GradSurgery release cuts.

    Args:
        n_parts: chunks per tensor, an integer >= 1. The paper uses 10.
        layers: "all" or "weights" (only tensors of two or more dimensions), see `Partition`.
    """

    def __init__(self, n_parts: int = 10, *, layers: Layers = "all") -> None:
        super().__init__(layers=layers)
        if isinstance(n_parts, bool) or not isinstance(n_parts, int) or n_parts < 1:
            raise UserError(f"n_parts is {n_parts!r}; it is the number of chunks per tensor, an integer >= 1")
        self.n_parts = n_parts

    def cut(self, tensor: int, name: str, n_rows: int) -> Iterator[tuple[Hashable, int]]:
        step = -(-n_rows // self.n_parts)
        for first in range(0, n_rows, step):
            yield (tensor, first), min(step, n_rows - first)


class PerFilter(Partition):
    """One part per row: an output filter of a convolution, an output unit of a linear layer.

    Args:
        layers: "all" or "weights" (only tensors of two or more dimensions), see `Partition`.
    """

    def cut(self, tensor: int, name: str, n_rows: int) -> Iterator[tuple[Hashable, int]]:
        for row in range(n_rows):
            yield (tensor, row), 1


class PerElement(Partition):
    """One part per element: the granularity of the sign rules. A Gram rule works on D x D numbers per element.

    Args:
        layers: "all" or "weights" (only tensors of two or more dimensions), see `Partition`.
    """

    def cut(self, tensor: int, name: str, n_rows: int) -> Iterator[tuple[Hashable, int]]:
        raise NotImplementedError("the partition `element` has no layout of parts: see gsdg/surgery/elementwise.py")


def part_of_rows(partition: Partition, shapes: Sequence[torch.Size], names: Sequence[str]) -> list[int]:
    """The part of every row of every tensor, numbered in order of appearance; `layers` is ignored."""
    numbers: dict[Hashable, int] = {}
    parts = []
    for tensor, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        n_rows, row_size = rows_of(shape)
        for key, count in partition.cut(tensor, name, n_rows) if row_size else ():
            parts += [numbers.setdefault(key, len(numbers))] * count
    return parts


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """(number of rows, elements per row) of a tensor; 0 elements per row where the tensor has none."""
    size = torch.Size(shape).numel()
    n_rows = shape[0] if len(shape) else 1
    return n_rows, size // n_rows if size else 0


def module_of(name: str) -> str:
    """`layer1.0.conv1.weight` -> `layer1.0.conv1`; `model` for a parameter of the top-level module."""
    return name.rpartition(".")[0] or "model"


def _require_names(names: Sequence[str] | None, granularity: str) -> Sequence[str]:
    if names is None:
        raise UserError(
            f"granularity {granularity!r} needs the names of the parameters, and none were given; pass names="
            "[name for name, _ in model.named_parameters()]"
        )
    return names
