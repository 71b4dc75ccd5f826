"""Granularity `element`: every number is a part. Nothing is tabulated; G is worked on in pieces that stay in cache.

An element-wise rule takes the pieces as they are. A Gram rule sees the D x D products of every number, PIECE of them at
a time; with the norm-outlier stage on, in two passes, because the norms of the modified tensors come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

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


class Piece(NamedTuple):
    """The elements `start` to `stop` of the flat axis, and which tensors they belong to: (tensor, elements) of each."""

    start: int
    stop: int
    shares: list[tuple[int, int]]


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
        self.sizes = list(sizes)
        self.tensors = torch.arange(len(self.sizes), device=device)
        self._ends = torch.tensor(list(accumulate(sizes)), device=device)
        longest = PIECE if device.type == "cpu" else PIECE_ACCELERATOR
        self._pieces = _pieces(self.sizes, operated, longest)
        self._pieces_by_tensor = _pieces(self.sizes, operated, longest, by_tensor=True)
        self._others = _pieces(self.sizes, [not flag for flag in operated], sum(self.sizes))

    def squares(self, G: Tensor) -> Tensor:
        """G [D, P] -> [T, D], the squared norms of the tensors' gradients."""
        tensors = G.split(self.sizes, dim=1)
        return torch.stack([torch.linalg.vector_norm(g, dim=1, dtype=accumulation_type(G)) for g in tensors]).square()

    def combine(self, G: Tensor, out: Tensor, step: int | Tensor, gram_eps: float) -> Metrics:
        """G [D, P] -> out [P], and the step's metrics, means over the elements operated on."""
        self._reduce_the_others(G, out)
        if isinstance(self.rule, ElementRule):
            return self._by_elements(G, out)
        return self._by_grams(G, out, self.rule, step, gram_eps)

    def _by_elements(self, G: Tensor, out: Tensor) -> Metrics:
        conflicts, masked = _Means(), {}
        for start, stop, _ in self._pieces if self.rule.looks_first else ():
            self.rule.look(G[:, start:stop].to(out.dtype))
        for start, stop, [(tensor, _)] in self._pieces_by_tensor:
            rows = G[:, start:stop].to(out.dtype)
            values, mask = self.rule.combine(rows)
            out[start:stop] = values
            conflicts.add(stop - start, *_sign_conflicts(rows))
            if mask is not None:
                masked[tensor] = masked.get(tensor, 0) + mask.sum()
        self._rescale(out, masked)
        return conflicts.metrics()

    def _rescale(self, out: Tensor, masked: dict[int, Tensor]) -> None:
        """Divide every tensor's update by the mean of its mask; masked: {tensor: the sum of its mask}."""
        updates = out.split(self.sizes)
        for tensor, total in masked.items():
            updates[tensor].div_(TINY + total / self.sizes[tensor])

    def _by_grams(self, G: Tensor, out: Tensor, rule: GramRule, step: int | Tensor, gram_eps: float) -> Metrics:
        found, shares = _Means(), None
        if not self.outliers.off:
            shares = self.outliers.shares(self._modified_norms(G, rule, gram_eps), step, gram_eps)  # [T, D]
        for start, stop, _ in self._pieces:
            rows, C, M, metrics = self._coefficients(G, start, stop, rule, gram_eps)
            if shares is not None:
                C = C * shares[self._tensors_of(start, stop)].t().unsqueeze(1)
            out[start:stop] = (C.sum(0) * rows).sum(0)
            found.add(stop - start, metrics["conflict_rate"], metrics["removed_norm_ratio"])
        return found.metrics()

    def _modified_norms(self, G: Tensor, rule: GramRule, gram_eps: float) -> Tensor:
        """[T, D] norms of the modified gradients of every tensor.

        One sum for each tensor and piece, in a fixed order: index_add_ would add in any order on a GPU.
        """
        sums = [G.new_zeros(len(G), dtype=wide_type(G.device))] * len(self.sizes)
        for start, stop, shares in self._pieces:
            _, C, M, _ = self._coefficients(G, start, stop, rule, gram_eps)
            squares = modified_squares(C, M).split([count for _, count in shares])
            for (tensor, _), elements in zip(shares, squares, strict=True):
                sums[tensor] = sums[tensor] + elements.sum(0)
        return torch.stack(sums).sqrt()

    def _coefficients(
        self, G: Tensor, start: int, stop: int, rule: GramRule, gram_eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Metrics]:
        """The piece's rows [D, n], C and M [D, D, n], all wide, and the rule's metrics."""
        rows = G[:, start:stop].to(wide_type(G.device))
        M = rows.unsqueeze(1) * rows
        C, metrics = rule.coefficients(M, gram_eps)
        return rows, C, M, metrics

    def _reduce_the_others(self, G: Tensor, out: Tensor) -> None:
        for start, stop, _ in self._others:
            torch.sum(G[:, start:stop], 0, dtype=out.dtype, out=out[start:stop])
            if self.rule.reduction == "mean":
                out[start:stop] /= len(G)

    def _tensors_of(self, start: int, stop: int) -> Tensor:
        """[stop - start]: the tensor of each element."""
        return torch.searchsorted(self._ends, torch.arange(start, stop, device=self._ends.device), right=True)


def _pieces(sizes: Sequence[int], chosen: Sequence[bool], longest: int, *, by_tensor: bool = False) -> list[Piece]:
    """The elements of the chosen tensors, at most `longest` neighbours a piece; `by_tensor`: of one tensor each."""
    pieces: list[Piece] = []
    start = 0
    for tensor, (size, wanted) in enumerate(zip(sizes, chosen, strict=True)):
        end = start + size
        while wanted and start < end:
            last = pieces[-1] if pieces else None
            joins = last and last.stop == start and not by_tensor
            if not joins or last.stop - last.start == longest:
                pieces.append(last := Piece(start, start, []))
            count = min(end - start, longest - (last.stop - last.start))
            start += count
            last.shares.append((tensor, count))
            pieces[-1] = last._replace(stop=start)
        start = end
    return pieces


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
