"""EQRM, empirical quantile risk minimisation (Eastwood et al., NeurIPS 2022, arXiv:2207.09944).

    min_theta  F^-1(alpha),   F(x) = 1/D sum_d Phi((x - R_d) / h),   h = 1.06 s D^(-1/5)

R_d is the mean cross-entropy of domain d, Phi the normal CDF, s the risks' standard deviation (divided by D - 1): the
alpha-quantile of the risks under a Gaussian kernel density. Before `anneal_steps` steps the loss is the mean risk; then
the optimizer forgets its moments and its learning rate becomes `final_lr`.

Stretching or shifting the risks does the same to the quantile x, so that x = sum_d c_d R_d with c_d = dx/dR_d: as one
loss a domain, L_d = D c_d R_d with c held constant. Implicit differentiation of F(x) = alpha gives

    c_d = p_d + dh/dR_d sum_e p_e (x - R_e) / h,   p = softmax over domains of -((x - R) / h)^2 / 2

Deviations: DomainBed, like the authors' code, differentiates through its bisection, whose comparisons have no gradient:
to it x is a fixed point between the ends of the bracket, which follow the lowest and the highest risk. The domains
between, with three domains or more, get no weight but through h (`gradient: bracket`). It waits for the device at every
bisection, and forwards the domains one by one, which differs where BatchNorm takes statistics. Its search draws
burn-ins that are no integers: it then never forgets the moments nor takes `eqrm_lr`; ours are cut to integers. The
authors' CMNIST code rescales the gradient after the burn-in. An alpha beyond what a float can hold, which both take as
log(1 - alpha), is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from gsdg.algorithms.annealing import Annealing
from gsdg.algorithms.domain_losses import DomainLosses
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.algorithms.risks import domain_risks
from gsdg.batch import Batch
from gsdg.errors import check_literal, check_range

Gradient = Literal["exact", "bracket"]
ROUNDS, CUTS = 4, 256  # each round keeps one of the bracket's 256 parts: 2^-32 of it is left, as after 32 bisections


class EQRM(DomainLosses):
    """quantile: alpha. gradient: `exact`, or `bracket`, DomainBed's. The rest is in the module's text."""

    needs_domains = 2

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
        """risks [D] -> c [D]: sum 1, and with the risks the quantile. 1/D where all risks are equal."""
        spread = risks.std()
        points = (risks - risks.mean()) / spread
        found = quantile_weights(points, self.quantile, exact=self.gradient == "exact")
        return torch.where(spread > 0, found, 1 / len(risks))

    def step(self, optimizer: Optimizer) -> None:
        if self.annealing.done == self.annealing.steps:
            for group in optimizer.param_groups:  # saved by the optimizer
                group["lr"] = self.final_lr
        self.annealing.step(optimizer)


def quantile_weights(points: Tensor, alpha: float, *, exact: bool) -> Tensor:
    """points [D] of mean 0 and standard deviation 1 -> [D]: the derivatives of their alpha-quantile in them."""
    width = 1.06 * len(points) ** -0.2
    tail = width * NormalDist().inv_cdf(alpha)
    low, high = points.min() + tail, points.max() + tail
    share = bracketed(points / width, low / width, high / width, alpha)
    slope = points / (len(points) - 1)  # of the standard deviation in each point
    if not exact:
        place = torch.arange(len(points), device=points.device)
        ends = torch.where(place == points.argmin(), 1 - share, 0) + torch.where(place == points.argmax(), share, 0)
        return ends + tail * slope
    offsets = torch.lerp(low, high, share) - points
    pull = (-(offsets / width).square() / 2).softmax(0)
    return pull + slope * (pull * offsets).sum()


def bracketed(centres: Tensor, low: Tensor, high: Tensor, alpha: float) -> Tensor:
    """Where between low (0) and high (1) the mean CDF of the unit normals at centres [D] reaches alpha, 0-dim."""
    share, step = torch.zeros_like(low), 1.0
    cuts = torch.arange(1, CUTS, dtype=low.dtype, device=low.device)
    for _ in range(ROUNDS):
        step /= CUTS
        x = torch.lerp(low, high, share + step * cuts)
        below = torch.erf((x[:, None] - centres) / math.sqrt(2)).mean(1) <= 2 * alpha - 1
        share = share + step * below.sum()
    return share + step / 2
