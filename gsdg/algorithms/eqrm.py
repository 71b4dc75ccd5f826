"""EQRM, empirical quantile risk minimisation (Eastwood et al., NeurIPS 2022, arXiv:2207.09944).

    min_theta  F^-1(alpha),   F(x) = 1/D sum_d Phi((x - R_d) / h),   h = 1.06 s D^(-1/5)

R_d is the mean cross-entropy of domain d, Phi the normal CDF, s the standard deviation of the risks (divided by D - 1):
the loss is the alpha-quantile of the risks under a Gaussian kernel density estimate. During the first `anneal_steps`
steps the loss is the mean risk; then the optimizer state is reset and the learning rate becomes `final_lr`.

Scaling or shifting the risks scales or shifts the quantile x in the same way, so x = sum_d c_d R_d with c_d = dx/dR_d.
Written as one loss per domain: L_d = D c_d R_d with c_d held constant. Implicit differentiation of F(x) = alpha gives

    c_d = p_d + dh/dR_d sum_e p_e (x - R_e) / h,   p = softmax over domains of -((x - R) / h)^2 / 2

Deviations from DomainBed and the authors' code: they differentiate through their bisection, whose comparisons have no
gradient. To autograd x is then a fixed point between the ends of the bracket, which depend on the lowest and the
highest risk only, so that with three or more domains those in between have no weight except through h (`gradient:
bracket`). DomainBed synchronizes with the device at every bisection step, and makes one forward pass per domain, which
is different if BatchNorm is in train mode. The burn-in periods that its search draws are no integers: it then never
resets the optimizer state and never uses `eqrm_lr`; here they are rounded down. The authors' code for CMNIST rescales
the gradient after the burn-in. Values of alpha closer to 1 than a float can represent, which both pass as log(1 -
alpha), are not supported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from gsdg.algorithms.common.annealing import Annealing
from gsdg.algorithms.common.domain_losses import DomainLosses
from gsdg.algorithms.common.domain_risks import domain_risks
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.types import Batch
from gsdg.utils.errors import check_literal, check_range

Gradient = Literal["exact", "bracket"]
ROUNDS, CUTS = 4, 256  # each round divides the bracket by 256: 2^-32 of it is left, as after 32 bisections


class EQRM(DomainLosses):
    """A quantile of the domain risks is minimised instead of their mean.

    Args:
        quantile: alpha, in (0, 1).
        anneal_steps: number of training steps at the start in which the mean risk is minimised, >= 0.
        final_lr: learning rate after these steps, >= 0.
        gradient: `exact`, the derivative of the quantile; `bracket`, DomainBed's, see the module's docstring.
        surgery: gradient surgery on the domains' losses, or None.
    """

    min_domains = 2
    sets_learning_rate = True

    def __init__(
        self,
        *,
        quantile: float,
        anneal_steps: int,
        final_lr: float,
        gradient: Gradient = "exact",
        surgery: GradSurgery | None = None,
    ) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "(0, 1)", quantile=quantile)
        check_range("algorithm", "[0, inf)", final_lr=final_lr)
        check_literal("algorithm.gradient", gradient, Gradient)
        self.quantile, self.final_lr, self.gradient = quantile, final_lr, gradient
        self.annealing = Annealing(steps=anneal_steps, before=0.0, after=1.0)

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        risks = domain_risks(self.model, batches)
        weights = 1.0 if self.annealing.waiting else len(risks) * self.weights(risks.detach())
        return list(weights * risks), {"nll": risks.mean()}

    def weights(self, risks: Tensor) -> Tensor:
        """The weights c [D] of the risks [D]: they sum to 1, and c . R is the quantile. 1/D if all risks are equal."""
        spread = risks.std()
        points = (risks - risks.mean()) / spread
        weights = quantile_weights(points, self.quantile, exact=self.gradient == "exact")
        return torch.where(spread > 0, weights, 1 / len(risks))

    def step(self, optimizer: Optimizer) -> dict[str, Tensor]:
        if self.annealing.done == self.annealing.steps:
            for group in optimizer.param_groups:  # which are part of the optimizer's checkpoint
                group["lr"] = self.final_lr * group.get("lr_scale", 1.0)  # optimizer.groups, optimizer.layer_decay
        self.annealing.step(optimizer)
        return {}


def quantile_weights(points: Tensor, alpha: float, *, exact: bool) -> Tensor:
    """Derivatives [D] of the alpha-quantile with respect to points [D] of mean 0 and standard deviation 1."""
    # The quantile lies in the bracket from low to high, at this share of its length.
    width = 1.06 * len(points) ** -0.2
    tail = width * NormalDist().inv_cdf(alpha)
    low, high = points.min() + tail, points.max() + tail
    share = search_bracket(points / width, low / width, high / width, alpha)
    std_slope = points / (len(points) - 1)  # derivative of the standard deviation with respect to each point
    if not exact:
        index = torch.arange(len(points), device=points.device)
        ends = torch.where(index == points.argmin(), 1 - share, 0) + torch.where(index == points.argmax(), share, 0)
        return ends + tail * std_slope
    offsets = torch.lerp(low, high, share) - points
    p = (-(offsets / width).square() / 2).softmax(0)
    return p + std_slope * (p * offsets).sum()


def search_bracket(centres: Tensor, low: Tensor, high: Tensor, alpha: float) -> Tensor:
    """Where between low (0) and high (1) the mean CDF of unit normals at `centres` [D] reaches alpha, 0-dim."""
    share, step = torch.zeros_like(low), 1.0
    cuts = torch.arange(1, CUTS, dtype=low.dtype, device=low.device)
    for _ in range(ROUNDS):
        step /= CUTS
        x = torch.lerp(low, high, share + step * cuts)
        below = torch.erf((x[:, None] - centres) / math.sqrt(2)).mean(1) <= 2 * alpha - 1
        share = share + step * below.sum()
    return share + step / 2
