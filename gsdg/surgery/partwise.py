"""The combiner of every granularity from `filter` up to `model`: the rule sees one Gram matrix per part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gsdg.surgery.kernels.torch_kernels import kernels
from gsdg.surgery.norm_outliers import NormOutliers, modified_squares
from gsdg.surgery.part_layout import PartLayout
from gsdg.surgery.rules.base import GramRule, Metrics

# (squared norms [S, D] of pieces of the gradients, their tensors [S]) -> 0-dim bool on the device: whether all are
# finite; or None where the host has checked that they are
FiniteCheck = Callable[[Tensor, Tensor], Tensor | None]


class PartCombiner:
    """Combines the domain gradients of each part by a Gram rule and the norm-outlier correction."""

    def __init__(self, layout: PartLayout, rule: GramRule, outliers: NormOutliers) -> None:
        self.layout, self.rule, self.outliers = layout, rule, outliers

    def combine(
        self, G: Tensor, out: Tensor, step: int | Tensor, gram_eps: float, check_finite: FiniteCheck
    ) -> Metrics:
        """Write the update of the domain gradients G [D, P] to out [P] and return the metrics of the step.

        out is all zeros where `check_finite` returns False.
        """
        passes = kernels(G)
        # First pass over G: the Gram matrices of the slots, and of the parts as their sums.
        slots = passes.slot_grams(G, self.layout)  # [S, D, D]
        finite = check_finite(slots.diagonal(dim1=1, dim2=2), self.layout.slot_tensor)
        M = self.layout.sums(slots)[: self.layout.n_operated].permute(1, 2, 0).contiguous()  # [D, D, K]
        if finite is not None:
            M = torch.where(finite, M, 0.0)  # NaN must not enter the state of a rule
        # D x D algebra: what the rule and the outlier correction make of each domain's gradient.
        C, metrics = self.rule.coefficients(M, gram_eps)
        if not self.outliers.off:
            C = self._corrected(C, M, step, gram_eps)
        # Second pass over G: the weighted sum of the domain gradients of each part.
        passes.combine(G, self._weights(C), self.layout, out, finite)
        return metrics

    def _corrected(self, C: Tensor, M: Tensor, step: int | Tensor, gram_eps: float) -> Tensor:
        """C [D, D, K] after the norm-outlier correction, which compares the norms of the units."""
        norms = self.layout.unit_sums(modified_squares(C, M)).sqrt()  # [U, D]
        unit_of_part = self.layout.part_unit[: self.layout.n_operated]
        shares = self.outliers.shares(norms, step, gram_eps)[unit_of_part]  # [K, D]
        return C * shares.t().unsqueeze(1)

    def _weights(self, C: Tensor) -> Tensor:
        """The weight of each domain in each part [K, D]: from the rule, and for the other parts sum or mean."""
        D = len(C)
        plain = 1 / D if self.rule.reduction == "mean" else 1.0
        others = C.new_full((self.layout.n_parts - self.layout.n_operated, D), plain)
        return torch.cat((C.sum(0).t(), others))
