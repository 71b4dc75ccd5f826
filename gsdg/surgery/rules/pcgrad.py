"""PCGrad (Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, arXiv 2001.06782).

For each domain i and all other domains j in random order: g_i -= <g_i, g_j> / ||g_j||^2 g_j if <g_i, g_j> < 0, where
g_j is the original gradient. The update is the sum over the domains.

Deviations from the authors' code: the guards of `projection.py`; at granularities finer than `model` all parts share
the random orders of a step. At the granularity `element` the update equals that of Agr-Sum, except that Agr-Sum counts
an exact zero as disagreement and PCGrad does not.
"""

from __future__ import annotations

from torch import Tensor

from gsdg.surgery.rules.base import GramRule, Metrics, Reduction
from gsdg.surgery.rules.projection import project, random_pairs
from gsdg.utils.errors import check_literal


class PCGrad(GramRule):
    """PCGrad: each domain gradient, projected off the original gradients with which it conflicts.

    Args:
        reduction: "sum" or "mean" over the domains.
    """

    def __init__(self, *, reduction: Reduction = "sum") -> None:
        check_literal("reduction", reduction, Reduction)
        self.reduction = reduction

    def start_step(self, n_domains: int) -> None:
        self._pairs = random_pairs(n_domains)

    def coefficients(self, M: Tensor, gram_eps: float) -> tuple[Tensor, Metrics]:
        C, metrics = project(M, self._pairs, on_original=True, gram_eps=gram_eps)
        return (C if self.reduction == "sum" else C / len(M)), metrics
