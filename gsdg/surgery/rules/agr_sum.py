"""Agr-Sum (Mansilla et al., "Domain Generalization via Gradient Surgery", ICCV 2021, arXiv 2108.01621).

Per element: sum_i g_i where the signs of all domains agree, else 0.

As in the authors' code, an exact zero agrees with nothing, not even with another zero; where all are zero the sum is
zero too. No deviation: they flatten the whole model, but no element depends on another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsdg.errors import check_literal
from gsdg.surgery.rules.base import ElementRule, Reduction


class AgrSum(ElementRule):
    """reduction: "sum" over the domains, or their "mean"."""

    def __init__(self, *, reduction: Reduction = "sum") -> None:
        check_literal("reduction", reduction, Reduction)
        self.reduction = reduction

    def combine(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.where(agreement(rows), self._reduced(rows), 0.0), None

    def _reduced(self, rows: Tensor) -> Tensor:
        return rows.sum(0) if self.reduction == "sum" else rows.mean(0)


def agreement(rows: Tensor) -> Tensor:
    """rows [D, n] -> [n], whether all are positive or all are negative."""
    return (rows.amin(0) > 0) | (rows.amax(0) < 0)
