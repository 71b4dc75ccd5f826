"""Agr-Sum (Mansilla et al., "Domain Generalization via Gradient Surgery", ICCV 2021, arXiv 2108.01621).

Per element: sum_i g_i where the signs of all domains agree, else 0.

As in the authors' code, an exact zero agrees with no value, not even with another zero; if all are zero, the sum is
zero as well. No deviation: the authors flatten the whole model, but no element depends on another element.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.surgery.rules.base import ElementRule, Reduction
from gsdg.utils.errors import check_literal


class AgrSum(ElementRule):
    """Agr-Sum: the sum where the signs of all domains agree, 0 elsewhere.

    Args:
        reduction: "sum" or "mean" over the domains.
    """

    def __init__(self, *, reduction: Reduction = "sum") -> None:
        check_literal("reduction", reduction, Reduction)
        self.reduction = reduction

    def combine(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.where(agreement(rows), self._reduced(rows), 0.0), None

    def _reduced(self, rows: Tensor) -> Tensor:
        return rows.sum(0) if self.reduction == "sum" else rows.mean(0)


def agreement(rows: Tensor) -> Tensor:
    """Whether the elements of rows [D, n] are all positive or all negative over the domains: [n] bool."""
    return (rows.amin(0) > 0) | (rows.amax(0) < 0)
