"""Granularity `element`: every number is a part. Nothing is tabulated; G is worked on in pieces that stay in cache.

An element-wise rule takes the pieces as they are. A Gram rule sees the D x D products of every number, PIECE of them at
a time; with the norm-outlier stage on, in two passes, because the norms of the modified tensors come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from gsdg.errors import UserError
from gsdg.surgery.grams import accumulation_type
from gsdg.surgery.outliers import NormOutliers, modified_squares
from gsdg.surgery.rules.base import ElementRule, GramRule, Metrics, Rule
from gsdg.surgery.table import wide_type

PIECE = 2**16  # elements; 9 float64 products of each are 5 MB
PIECE_ACCELERATOR = 2**20  # elements; fewer launches
TINY = 1e-10  # added to the mean of a tensor's mask, as in DomainBed


class Elements:
    """The pieces of the flat axis and what happens to each. operated: of each tensor, whether the rule sees it."""

    def __init__(
        self, sizes: Sequence[int], operated: Sequence[bool], rule: Rule, outliers: NormOutliers, device: torch.device
    ) -> None:
        if rule.per_part_state:
            raise UserError(
                f"{type(rule).__name__} remembers a D x D matrix for every part, at granularity element for every "
                "number; valid: filter and coarser"
            )
        if isinstance(rule, ElementRule) and not outliers.off:
            raise UserError(
                f"alpha is {outliers.alpha!r}, but {type(rule).__name__} is an element-wise rule, without modified "
                "gradients whose norms could be compared; set alpha=1"
            )
        self.rule, self.outliers = rule, outliers
        self.sizes, self.operated = list(sizes), list(operated)
        ends = list(accumulate(sizes))
        self.tensors = torch.arange(len(ends), device=device)
        self._ends = torch.tensor(ends, device=device)
        self._longest = PIECE if device.type == "cpu" else PIECE_ACCELERATOR

    def squares(self, G: Tensor) -> Tensor:
        """G [D, P] -> [T, D], the squared norms of the tensors' gradients."""
        tensors = G.split(self.sizes, dim=1)
        return torch.stack([torch.linalg.vector_norm(g, dim=1, dtype=accumulation_type(G)) for g in tensors]).square()

    def combine(self, G: Tensor, out: Tensor, step: int | Tensor, eps: float) -> Metrics:
        """G [D, P] -> out [P], and the step's metrics, means over the elements operated on."""
        self._reduce_the_others(G, out)
        if isinstance(self.rule, ElementRule):
            return self._by_elements(G, out)
        return self._by_grams(G, out, self.rule, step, eps)

    def _by_elements(self, G: Tensor, out: Tensor) -> Metrics:
        conflicts, masked = _Means(), None
        for start, stop in self._pieces() if self.rule.looks_first else ():
            self.rule.look(G[:, start:stop].to(out.dtype))
        for start, stop in self._pieces(by_tensor=True):
            rows = G[:, start:stop].to(out.dtype)
            values, mask = self.rule.combine(rows)
            out[start:stop] = values
            conflicts.add(stop - start, *_sign_conflicts(rows))
            if mask is not None:
                masked = out.new_zeros(len(self.sizes)) if masked is None else masked
                masked += torch.where(self.tensors == self._tensor_at(start), mask.sum(), 0.0)
        if masked is not None:
            self._rescale(out, masked)
        return conflicts.metrics()

    def _rescale(self, out: Tensor, masked: Tensor) -> None:
        """Divide every operated tensor's update by the mean of its mask; masked [T], the sums of the masks."""
        for tensor, (piece, total) in enumerate(zip(out.split(self.sizes), masked.unbind(), strict=True)):
            if self.operated[tensor] and self.sizes[tensor]:
                piece /= TINY + total / self.sizes[tensor]

    def _by_grams(self, G: Tensor, out: Tensor, rule: GramRule, step: int | Tensor, eps: float) -> Metrics:
        found, shares = _Means(), None
        if not self.outliers.off:
            shares = self.outliers.shares(self._modified_norms(G, rule, eps), step, eps)  # [T, D]
        for start, stop in self._pieces():
            rows, C, M, metrics = self._coefficients(G, start, stop, rule, eps)
            if shares is not None:
                C = C * shares[self._tensors_of(start, stop)].t().unsqueeze(1)
            out[start:stop] = (C.sum(0) * rows).sum(0)
            found.add(stop - start, metrics["conflict_rate"], metrics["removed_norm_ratio"])
        return found.metrics()

    def _modified_norms(self, G: Tensor, rule: GramRule, eps: float) -> Tensor:
        """[T, D] norms of the modified gradients of every tensor."""
        squares = G.new_zeros(len(self.sizes), len(G), dtype=wide_type(G.device))
        for start, stop in self._pieces():
            _, C, M, _ = self._coefficients(G, start, stop, rule, eps)
            squares.index_add_(0, self._tensors_of(start, stop), modified_squares(C, M))
        return squares.sqrt()

    def _coefficients(
        self, G: Tensor, start: int, stop: int, rule: GramRule, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Metrics]:
        """The piece's rows [D, n], C and M [D, D, n], all wide, and the rule's metrics."""
        rows = G[:, start:stop].to(wide_type(G.device))
        M = rows.unsqueeze(1) * rows
        C, metrics = rule.coefficients(M, eps)
        return rows, C, M, metrics

    def _reduce_the_others(self, G: Tensor, out: Tensor) -> None:
        for start, stop in self._ranges(False):
            torch.sum(G[:, start:stop], 0, dtype=out.dtype, out=out[start:stop])
            if self.rule.reduction == "mean":
                out[start:stop] /= len(G)

    def _pieces(self, *, by_tensor: bool = False) -> Iterator[tuple[int, int]]:
        """(start, stop) of neighbouring operated elements, PIECE at most; `by_tensor`, of one tensor only."""
        for start, stop in self._ranges(True, by_tensor):
            for first in range(start, stop, self._longest):
                yield first, min(first + self._longest, stop)

    def _ranges(self, operated: bool, by_tensor: bool = False) -> Iterator[tuple[int, int]]:
        """(start, stop) of runs of tensors that are, or are not, operated on."""
        start = stop = 0
        for size, this in zip(self.sizes, self.operated, strict=True):
            if this is not operated or by_tensor:
                if start < stop:
                    yield start, stop
                start = stop
            stop += size
            start = stop if this is not operated else start
        if start < stop:
            yield start, stop

    def _tensors_of(self, start: int, stop: int) -> Tensor:
        """[stop - start]: the tensor of each element."""
        return torch.searchsorted(self._ends, torch.arange(start, stop, device=self._ends.device), right=True)

    def _tensor_at(self, start: int) -> int:
        return next(tensor for tensor, end in enumerate(accumulate(self.sizes)) if start < end)


class _Means:
    """Means of the conflict metrics over pieces: the rate over elements, the ratio over conflicts."""

    def __init__(self) -> None:
        self.elements, self.conflicts, self.removed = 0, 0.0, 0.0

    def add(self, n: int, rate: Tensor, ratio: Tensor) -> None:
        self.elements += n
        self.conflicts = self.conflicts + n * rate
        self.removed = self.removed + n * rate * ratio

    def metrics(self) -> Metrics:
        rate = self.conflicts / max(1, self.elements)
        return {
            "conflict_rate": rate,
            "removed_norm_ratio": torch.where(rate > 0, self.removed / self.conflicts, 0.0),
        }


def _sign_conflicts(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [D, n] -> the share of pairs of opposite signs; of such a pair all would be removed, whence the 1."""
    D, n = rows.shape
    signs = rows.sign()
    balance, alive = signs.sum(0), signs.abs_().sum(0)  # of an element: plus - minus, and plus + minus
    rate = (alive.square() - balance.square()).sum() / 2 / max(1, n * D * (D - 1))
    return rate, torch.ones_like(rate)
