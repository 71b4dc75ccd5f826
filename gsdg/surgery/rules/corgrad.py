"""CorGrad, the rule of GradSurgery ("Rethinking Domain Generalization from Perspective of Gradient Granularity",
ECAI 2024), from the Gram matrices of the parts.

Per part, in domain order: g_i -= <g_i, g_p> / ||g_p||^2 g_p wherever <g_i, g_p> < 0, each g_p as it then is. Per
tensor, a domain whose modified norm lies more than one standard deviation from the mean norm is an outlier and becomes
alpha g_i + (1 - alpha) mu, mu the mean of the others. The update is the sum over domains. In the basis of the
original gradients row i is C_i, <g_i, g_p> = C_i M C_p^T, and the update has the weights w = 1^T B C.

Deliberate deviations from the released code, all where it acts on rounding errors (`eps` is 1e-12 for float64
gradients, 1e-6 for float32):
- nothing is projected on a g_p that the projections before have made vanish, ||g_p||^2 <= eps ||original g_p||^2:
  the release divides by the residue and gives NaN or noise;
- <g_i, g_p> counts as negative below -eps ||g_i|| ||g_p||. Projecting g_i makes it orthogonal to g_p, so the pair
  (p, i) comes out as plus or minus 1e-17, and the release counts about half of those as conflicts of size zero: its
  conflict rate is higher and its mean removed ratio lower than here; their product is the same;
- a domain needs a distance of std + eps * mean to be an outlier. With two domains both distances equal the std.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from gsdg.errors import UserError, listing
from gsdg.surgery.partition import Table

AlphaSchedule = Literal["constant", "log"]
Order = Literal["fixed", "random"]
ProjectOn = Literal["modified", "original"]
Reduction = Literal["sum", "mean"]


class CorGrad:
    """The weights of every part's rows under the rule above.

    alpha: blend weight of norm outliers, in [0, 1]; 1 switches the blend off.
    alpha_schedule: "constant", or "log": 1 - ln(t + 1) / ln(total_steps) in place of alpha, t = 0 at the first step.
    order: "fixed", the domains' order; "random", one permutation a step for all parts (torch's CPU generator).
    project_on: "modified", g_p as the projections before left it; "original", as PCGrad does.
    reduction: "sum" over the domains, or their "mean".
    """

    def __init__(
        self,
        *,
        alpha: float = 0.6,
        alpha_schedule: AlphaSchedule = "constant",
        total_steps: int | None = None,
        order: Order = "fixed",
        project_on: ProjectOn = "modified",
        reduction: Reduction = "sum",
    ) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 <= alpha <= 1:
            raise UserError(f"alpha is {alpha!r}; it is the blend weight of norm outliers, a number from 0 to 1")
        _check_literal("alpha_schedule", alpha_schedule, AlphaSchedule)
        _check_literal("order", order, Order)
        _check_literal("project_on", project_on, ProjectOn)
        _check_literal("reduction", reduction, Reduction)
        if alpha_schedule == "log" and (not isinstance(total_steps, int) or total_steps < 2):
            raise UserError(
                f"alpha_schedule='log' needs the length of training, but total_steps is {total_steps!r}; "
                "give the number of steps, an integer >= 2"
            )
        self.alpha = alpha
        self.alpha_schedule = alpha_schedule
        self.total_steps = total_steps
        self.order = order
        self.project_on = project_on
        self.reduction = reduction

    def alpha_at(self, step: int) -> float:
        """The blend weight at this step, 0 being the first."""
        if self.alpha_schedule == "constant":
            return float(self.alpha)
        return min(1.0, max(0.0, 1 - math.log(step + 1) / math.log(self.total_steps)))

    def weights(self, grams: Tensor, table: Table, *, step: int, eps: float) -> tuple[Tensor, dict[str, Tensor]]:
        """grams [K, D, D] float64 of the operated parts -> weights [K, D] and the step's metrics, 0-dim tensors.

        conflict_rate: conflicts / comparisons. removed_norm_ratio: ||removed|| / ||g_i before||, mean over conflicts.
        """
        K, D = grams.shape[:2]
        rows, conflicts, removed = self._project(grams.permute(1, 2, 0).contiguous(), eps)
        part_tensor = table.part_tensor[:K]
        squares = torch.stack([_inner(row, row) for row in rows], dim=1).clamp_min(0)  # [K, D]
        norms = squares.new_zeros(table.n_tensors, D).index_add_(0, part_tensor, squares).sqrt()
        blend = _outlier_weights(norms, self.alpha_at(step), eps)[part_tensor]  # [K, D]
        weights = sum(row[0] * factor for row, factor in zip(rows, blend.unbind(1), strict=True)).t()  # [K, D]
        total = conflicts.sum()
        metrics = {
            "conflict_rate": total / max(1, K * D * (D - 1)),
            "removed_norm_ratio": removed.sum() / total.clamp_min(1),
        }
        return weights if self.reduction == "sum" else weights / D, metrics

    def _project(self, M: Tensor, eps: float) -> tuple[list[Tensor], Tensor, Tensor]:
        """M [D, D, K] -> D rows [2, D, K] (C_i and C_i M); per part, conflicts [K] and the sum of removed ratios [K].

        K is the last axis: sums over D are then vectorised over the parts. torch.where in place of if: no host
        synchronisation.
        """
        D, _, K = M.shape
        eye = torch.eye(D, dtype=M.dtype, device=M.device).unsqueeze(-1).expand(D, D, K)
        originals = list(torch.stack((eye, M), dim=1).unbind(0))
        rows = list(originals)
        squares = M.diagonal().t()  # [D, K]
        lengths = squares.sqrt()
        conflicts, removed = M.new_zeros(K), M.new_zeros(K)
        order = torch.randperm(D).tolist() if self.order == "random" else range(D)
        for i in order:
            for p in order:
                if p == i:
                    continue
                onto = (originals if self.project_on == "original" else rows)[p]
                inner, square = _inner(rows[i], onto), _inner(onto, onto)
                conflict = (inner < -eps * lengths[i] * lengths[p]) & (square > eps * squares[p])
                # the maximum bounds the ratio by 1 (Cauchy-Schwarz) where rounding would not
                ratio = -inner / torch.maximum(square * _inner(rows[i], rows[i]), inner * inner).sqrt()
                removed += torch.where(conflict, ratio, 0.0)
                conflicts += conflict
                rows[i] = rows[i] - torch.where(conflict, inner / square, 0.0) * onto
        return rows, conflicts, removed


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """<g_a, g_b> [K] from two rows [2, D, K]: C_b against C_a M."""
    return (a[1] * b[0]).sum(0)


def _outlier_weights(norms: Tensor, alpha: float, eps: float) -> Tensor:
    """norms [T, D] of the modified tensors -> what each contributes to the sum after the outlier blend, [T, D].

    An outlier keeps alpha of itself; the 1 - alpha that it gives up is shared equally by the others.
    """
    mean = norms.mean(1, keepdim=True)
    distance = (norms - mean).abs()
    std = distance.square().mean(1, keepdim=True).sqrt()
    outlier = (distance > std + eps * mean).to(norms.dtype)
    given_up = (1 - alpha) * outlier.sum(1, keepdim=True)
    n_others = (1 - outlier).sum(1, keepdim=True).clamp_min(1)
    return alpha * outlier + (1 - outlier) * (1 + given_up / n_others)


def _check_literal(name: str, value: object, literal: object) -> None:
    if value not in get_args(literal):
        raise UserError(f"{name} is {value!r}; valid: {listing(get_args(literal))}")
