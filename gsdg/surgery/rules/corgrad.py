"""CorGrad, the rule of GradSurgery ("Rethinking Domain Generalization from Perspective of Gradient Granularity",
ECAI 2024), from the Gram matrices of the parts. The second half of the method, the norm-outlier correction, is in
`norm_outliers.py`.

Per part, for each i and each p != i in domain order: g_i -= <g_i, g_p> / ||g_p||^2 g_p if <g_i, g_p> < 0, where g_p
includes its earlier projections. The update is the sum over the domains.

Deviations from the released code: the guards of `projection.py`. The release counts about half of the pairs that it has
just made orthogonal as conflicts of size zero: its conflict rate is higher and its mean removed ratio is lower than
here; their product is the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gsdg.surgery.rules.base import GramRule, Metrics, Reduction
from gsdg.surgery.rules.projection import project
from gsdg.utils.errors import check_literal

Order = Literal["fixed", "random"]
ProjectOn = Literal["modified", "original"]


class CorGrad(GramRule):
    """The projections of GradSurgery.

    Args:
        order: "fixed": the order of the domains; "random": one permutation per step for all parts (from torch's CPU
            generator).
        project_on: "modified": project on g_p after its own earlier projections; "original": on the original g_p, as
            PCGrad does.
        reduction: "sum" or "mean" over the domains.
    """

    def __init__(
        self, *, order: Order = "fixed", project_on: ProjectOn = "modified", reduction: Reduction = "sum"
    ) -> None:
        check_literal("order", order, Order)
        check_literal("project_on", project_on, ProjectOn)
        check_literal("reduction", reduction, Reduction)
        self.order, self.project_on, self.reduction = order, project_on, reduction

    def start_step(self, n_domains: int) -> None:
        order = torch.randperm(n_domains).tolist() if self.order == "random" else range(n_domains)
        self._pairs = [(i, p) for i in order for p in order if p != i]

    def coefficients(self, M: Tensor, gram_eps: float) -> tuple[Tensor, Metrics]:
        C, metrics = project(M, self._pairs, on_original=self.project_on == "original", gram_eps=gram_eps)
        return (C if self.reduction == "sum" else C / len(M)), metrics
