"""V-REx, variance risk extrapolation (Krueger et al., ICML 2021, arXiv:2003.00688).

    min_theta  mean_d R_d + w(t) var_d R_d        var: divided by D

R_d is the mean cross-entropy of domain d. w(t) is 1 during the first `anneal_steps` steps, then `penalty_weight`.

Written as one loss per domain, L_d = R_d + w (R_d - m)^2, with the mean risk m held constant: the gradient terms
through m cancel in the sum over d, so that the mean of the L_d has the value and the gradient above.

Deviations: none from DomainBed. The paper adds the variance to the sum of the risks: its beta is D times this weight.
The authors' code for two domains penalises (R_1 - R_2)^2, four times the variance, divides the loss by the weight if
that is above 1, and adds an L2 term (here the optimizer's weight decay); its PACS code counts the second domain twice
in the penalty and leaves out the third.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from gsdg.algorithms.common.annealing import Annealing
from gsdg.algorithms.common.domain_losses import DomainLosses
from gsdg.algorithms.common.domain_risks import domain_risks
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.types import Batch
from gsdg.utils.errors import check_range


class VREx(DomainLosses):
    """The mean of the domain risks plus a penalty on their variance.

    Args:
        penalty_weight: w, weight of the variance after `anneal_steps` steps, >= 0; before that it is 1.
        anneal_steps: number of training steps with penalty weight 1, >= 0.
        surgery: gradient surgery on the domains' losses, or None.
    """

    min_domains = 2

    def __init__(self, *, penalty_weight: float, anneal_steps: int, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, inf)", penalty_weight=penalty_weight)
        self.annealing = Annealing(steps=anneal_steps, before=1.0, after=penalty_weight)

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        risks = domain_risks(self.model, batches)
        penalties = (risks - risks.mean().detach()).square()
        losses = risks + self.annealing.weight * penalties
        return list(losses), {"nll": risks.mean(), "penalty": penalties.mean()}

    def step(self, optimizer: Optimizer) -> dict[str, Tensor]:
        self.annealing.step(optimizer)
        return {}
