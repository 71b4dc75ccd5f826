"""PCGrad (Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, arXiv 2001.06782).

For every domain i, the others j in random order: g_i -= <g_i, g_j> / ||g_j||^2 g_j wherever <g_i, g_j> < 0, with g_j as
it was originally. The update is the sum over the domains.

Deviations from the authors' code: the guards of `projection.py`; at a granularity finer than the model all parts share
the step's random orders. At the granularity `element` the sum is Agr-Sum's, but that Agr-Sum counts an exact zero as
disagreement and PCGrad does not.
"""

from __future__ import annotations

from torch import Tensor

from gsdg.errors import check_literal
from gsdg.surgery.rules.base import GramRule, Metrics, Reduction
from gsdg.surgery.rules.projection import drawn_pairs, project


class PCGrad(GramRule):
    """reduction: "sum" over the domains, or their "mean"."""

    def __init__(self, *, reduction: Reduction = "sum") -> None:
        check_literal("reduction", reduction, Reduction)
        self.reduction = reduction

    def start_step(self, n_domains: int) -> None:
        self._pairs = drawn_pairs(n_domains)

    def coefficients(self, M: Tensor, gram_eps: float) -> tuple[Tensor, Metrics]:
        C, metrics = project(M, self._pairs, on_original=True, gram_eps=gram_eps)
        return (C if self.reduction == "sum" else C / len(M)), metrics
