"""The combiners of the granularity `element`, where every element is a part: there is no layout of parts.

G [D, P] is processed in pieces of at most PIECE elements, which stay in cache. There are two combiners, one per kind of
rule:

- `ElementRuleCombiner`: an element-wise rule is given the gradients of each piece.
- `ElementGramCombiner`: a Gram rule is given the D x D products of every element of a piece. With the norm-outlier
  correction on, this takes two passes over G: the first computes the norms of the modified gradients of every tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from gsdg.surgery.kernels.torch_kernels import accumulation_type
from gsdg.surgery.norm_outliers import NormOutliers, modified_squares
from gsdg.surgery.part_layout import wide_type
from gsdg.surgery.partwise import FiniteCheck
from gsdg.surgery.rules.base import ElementRule, GramRule, Metrics, Rule
from gsdg.utils.errors import UserError

PIECE = 2**16  # elements; their 9 products for three domains are 5 MB in float64
PIECE_ACCELERATOR = 2**20  # elements; fewer kernel launches
MASK_EPS = 1e-10  # added to the mean of a tensor's mask, as in DomainBed


class Piece(NamedTuple):
    """Elements `start` to `stop` of the flat axis; shares: (tensor, number of its elements) of each tensor in them."""

    start: int
    stop: int
    shares: list[tuple[int, int]]


class _ElementCombiner(ABC):
    """What both combiners share: the finite check, and the sum or mean of tensors that the rule does not operate on.

    Args:
        sizes: elements per tensor.
        operated: whether the rule operates on the tensor, one flag per tensor.
    """

    def __init__(
        self, sizes: Sequence[int], operated: Sequence[bool], rule: Rule, outliers: NormOutliers, device: torch.device
    ) -> None:
        if rule.per_part_state:
            raise UserError(
                f"{type(rule).__name__} keeps a D x D matrix per part, which at the granularity element is one per "
                "element; valid: filter and coarser"
            )
        if isinstance(rule, ElementRule) and not outliers.off:
            raise UserError(
                f"alpha is {outliers.alpha!r}, but {type(rule).__name__} is an element-wise rule, without modified "
                "gradients whose norms could be compared; set alpha=1"
            )
        self.rule, self.outliers = rule, outliers
        self._sizes = list(sizes)
        self._tensors = torch.arange(len(sizes), device=device)
        self._ends = torch.tensor(list(accumulate(sizes)), device=device)  # [T], of each tensor on the flat axis
        longest = PIECE if device.type == "cpu" else PIECE_ACCELERATOR
        self._pieces = _pieces(sizes, operated, longest)
        self._pieces_by_tensor = _pieces(sizes, operated, longest, by_tensor=True)
        self._reduced_pieces = _pieces(sizes, [not flag for flag in operated], sum(sizes))

    def combine(
        self, G: Tensor, out: Tensor, step: int | Tensor, gram_eps: float, check_finite: FiniteCheck
    ) -> Metrics:
        """Write the update of the domain gradients G [D, P] to out [P] and return the metrics of the step.

        The metrics are means over the elements operated on. out and metrics are 0 where `check_finite` returns False.
        """
        finite = check_finite(self._squares(G), self._tensors)
        self._reduce_others(G, out)
        metrics = self._combine_operated(G, out, step, gram_eps)
        if finite is None:
            return metrics
        out.masked_fill_(~finite, 0)
        return {name: torch.where(finite, value, 0.0) for name, value in metrics.items()}

    @abstractmethod
    def _combine_operated(self, G: Tensor, out: Tensor, step: int | Tensor, gram_eps: float) -> Metrics:
        """Write the update of the tensors that the rule operates on to out [P]; returns the metrics."""

    def _squares(self, G: Tensor) -> Tensor:
        """The squared norms [T, D] of the gradients of each tensor."""
        tensors = G.split(self._sizes, dim=1)
        return torch.stack([torch.linalg.vector_norm(g, dim=1, dtype=accumulation_type(G)) for g in tensors]).square()

    def _reduce_others(self, G: Tensor, out: Tensor) -> None:
        for start, stop, _ in self._reduced_pieces:
            torch.sum(G[:, start:stop], 0, dtype=out.dtype, out=out[start:stop])
            if self.rule.reduction == "mean":
                out[start:stop] /= len(G)


class ElementRuleCombiner(_ElementCombiner):
    """Combines the domain gradients by an element-wise rule."""

    rule: ElementRule

    def _combine_operated(self, G: Tensor, out: Tensor, step: int | Tensor, gram_eps: float) -> Metrics:
        if self.rule.needs_first_pass:
            for start, stop, _ in self._pieces:
                self.rule.first_pass(G[:, start:stop].to(out.dtype))
        conflicts = _ConflictMeans(out.new_zeros(()))
        mask_sums: dict[int, Tensor] = {}  # tensor -> the sum of its mask
        for start, stop, [(tensor, _)] in self._pieces_by_tensor:
            rows = G[:, start:stop].to(out.dtype)
            values, mask = self.rule.combine(rows)
            out[start:stop] = values
            conflicts.add(stop - start, *_sign_conflicts(rows))
            if mask is not None:
                mask_sums[tensor] = mask_sums.get(tensor, 0) + mask.sum()
        self._rescale(out, mask_sums)
        return conflicts.metrics()

    def _rescale(self, out: Tensor, mask_sums: dict[int, Tensor]) -> None:
        """Divide the update of every masked tensor by the mean of its mask."""
        updates = out.split(self._sizes)
        for tensor, total in mask_sums.items():
            updates[tensor].div_(MASK_EPS + total / self._sizes[tensor])


class ElementGramCombiner(_ElementCombiner):
    """Combines the domain gradients of every single element by a Gram rule and the norm-outlier correction."""

    rule: GramRule

    def _combine_operated(self, G: Tensor, out: Tensor, step: int | Tensor, gram_eps: float) -> Metrics:
        shares = None
        if not self.outliers.off:
            shares = self.outliers.shares(self._modified_norms(G, gram_eps), step, gram_eps)  # [T, D]
        conflicts = _ConflictMeans(G.new_zeros((), dtype=wide_type(G.device)))
        for start, stop, _ in self._pieces:
            rows, C, _, metrics = self._coefficients(G, start, stop, gram_eps)
            if shares is not None:
                C = C * shares[self._tensors_of(start, stop)].t().unsqueeze(1)
            out[start:stop] = (C.sum(0) * rows).sum(0)
            conflicts.add(stop - start, metrics["conflict_rate"], metrics["removed_norm_ratio"])
        return conflicts.metrics()

    def _modified_norms(self, G: Tensor, gram_eps: float) -> Tensor:
        """The norms [T, D] of the modified gradients of every tensor.

        One sum per tensor and piece, in a fixed order: index_add_ has no fixed order of additions on a GPU.
        """
        sums = [G.new_zeros(len(G), dtype=wide_type(G.device))] * len(self._sizes)
        for start, stop, shares in self._pieces:
            _, C, M, _ = self._coefficients(G, start, stop, gram_eps)
            squares = modified_squares(C, M).split([count for _, count in shares])
            for (tensor, _), elements in zip(shares, squares, strict=True):
                sums[tensor] = sums[tensor] + elements.sum(0)
        return torch.stack(sums).sqrt()

    def _coefficients(
        self, G: Tensor, start: int, stop: int, gram_eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Metrics]:
        """The gradients [D, n] of elements start to stop, their C and M [D, D, n], and the metrics of the rule.

        All in float64 (float32 on MPS).
        """
        rows = G[:, start:stop].to(wide_type(G.device))
        M = rows.unsqueeze(1) * rows
        C, metrics = self.rule.coefficients(M, gram_eps)
        return rows, C, M, metrics

    def _tensors_of(self, start: int, stop: int) -> Tensor:
        """The tensor of each of the elements start to stop: [stop - start]."""
        return torch.searchsorted(self._ends, torch.arange(start, stop, device=self._ends.device), right=True)


class _Span(NamedTuple):
    """The elements of one tensor on the flat axis."""

    tensor: int
    start: int
    stop: int


def _pieces(sizes: Sequence[int], chosen: Sequence[bool], longest: int, *, by_tensor: bool = False) -> list[Piece]:
    """Cut the elements of the chosen tensors into pieces of at most `longest` adjacent elements.

    by_tensor: whether a piece ends where its tensor ends; otherwise a piece may span several adjacent tensors.
    """
    stops = list(accumulate(sizes))
    spans = [_Span(t, stop - size, stop) for t, (size, stop) in enumerate(zip(sizes, stops, strict=True)) if size]
    runs = groupby(spans, key=lambda span: (chosen[span.tensor], span.tensor if by_tensor else None))
    return [piece for (wanted, _), run in runs if wanted for piece in _cut_run(list(run), longest)]


def _cut_run(run: Sequence[_Span], longest: int) -> list[Piece]:
    """Cut a run of adjacent tensors into pieces of at most `longest` elements."""
    pieces = []
    for start in range(run[0].start, run[-1].stop, longest):
        stop = min(start + longest, run[-1].stop)
        overlaps = [(span.tensor, min(stop, span.stop) - max(start, span.start)) for span in run]
        pieces.append(Piece(start, stop, [(tensor, count) for tensor, count in overlaps if count > 0]))
    return pieces


class _ConflictMeans:
    """Means of the conflict metrics over pieces: of the rate over elements, of the removed ratio over conflicts.

    zero: 0-dim, with the dtype and device of the metrics.
    """

    def __init__(self, zero: Tensor) -> None:
        self.elements, self.conflicts, self.removed = 0, zero, zero

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
    """The share of domain pairs with opposite signs in rows [D, n], and the removed ratio of such a pair.

    The ratio is 1: of two numbers of opposite sign, a projection removes all of one.
    """
    D, n = rows.shape
    signs = rows.sign()
    balance, nonzero = signs.sum(0), signs.abs_().sum(0)  # per element: plus - minus, and plus + minus
    rate = (nonzero.square() - balance.square()).sum() / 2 / max(1, n * D * (D - 1))
    return rate, torch.ones_like(rate)
