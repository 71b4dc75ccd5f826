"""V-REx, variance risk extrapolation (Krueger et al., ICML 2021, arXiv:2003.00688).

    min_theta  mean_d R_d + w(t) var_d R_d        var: divided by D

R_d is the mean cross-entropy of domain d. w(t) is 1 before `anneal_steps` steps, then `penalty_weight`.

Written as one loss a domain, L_d = R_d + w (R_d - m)^2, with the mean risk m held constant: the terms of its gradient
cancel in the sum over d, so that the mean of the L_d has the value and the gradient above.

Deviations: none from DomainBed. The paper adds the variance to the sum of the risks: its beta is D times our weight.
The authors' code for two domains penalises (R_1 - R_2)^2, four times the variance, divides the loss by the weight where
that is above 1, and adds an L2 term (here the optimizer's); its PACS code counts the second domain twice in the penalty
and leaves the third out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from gsdg.algorithms.annealing import Annealing
from gsdg.algorithms.domain_losses import DomainLosses
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.algorithms.risks import domain_risks
from gsdg.batch import Batch
from gsdg.errors import check_range


class VREx(DomainLosses):
    """penalty_weight: of the risks' variance, once `anneal_steps` steps are done; before that it is 1."""

    needs_domains = 2

    def __init__(self, *, penalty_weight: float, anneal_steps: int, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, inf)", penalty_weight=penalty_weight)
        self.annealing = Annealing(steps=anneal_steps, before=1.0, after=penalty_weight)

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        risks = domain_risks(self.model, batches)
        penalties = (risks - risks.mean().detach()).square()
        losses = risks + self.annealing.weight * penalties
        return list(losses), {"nll": risks.mean(), "penalty": penalties.mean()}

    def step(self, optimizer: Optimizer) -> None:
        self.annealing.step(optimizer)
