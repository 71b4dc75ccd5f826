"""IGA, inter-environmental gradient alignment (Koyama and Yamaguchi, 2020, arXiv:2008.01883).

    min_theta  mean_d R_d + w sum_d |g_d - g|^2        g_d = grad R_d,  g = mean_d g_d

R_d is the mean cross-entropy of domain d. The gradient of the penalty is 2 sum_d H_d (g_d - g), with the Hessians H_d:
what g itself would contribute, -2 H sum_d (g_d - g), is zero, so that g may be held constant. Written as one loss per
domain, L_d = R_d + w D |g_d - g|^2: the mean of the L_d has the value and the gradient above.

Each domain has a forward of its own, as in DomainBed: D backward passes through a joint graph would cost D times more.

Deviations: none from DomainBed, whose missing create_graph on g changes nothing, as shown above. The paper's penalty is
the trace of the variance, the mean over domains where this is the sum: its lambda is D times our weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms.domain_losses import DomainLosses
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.batch import Batch
from gsdg.errors import check_range


class IGA(DomainLosses):
    """penalty_weight: of the domains' squared distances from the mean gradient."""

    needs_domains = 2

    def __init__(self, *, penalty_weight: float, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, inf)", penalty_weight=penalty_weight)
        self.penalty_weight = penalty_weight

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        risks = torch.stack([F.cross_entropy(self.model(batch.images), batch.labels) for batch in batches])
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        penalties = distances([gradients(risk, parameters) for risk in risks])
        losses = risks + self.penalty_weight * len(risks) * penalties
        return list(losses), {"nll": risks.mean(), "penalty": penalties.sum()}


def gradients(risk: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """One a parameter, with a graph; zeros for one that the risk does not depend on."""
    return torch.autograd.grad(risk, parameters, create_graph=True, materialize_grads=True)


def distances(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """D gradients, one tensor a parameter -> [D], the squared distance of each from their mean, held constant."""
    with torch.no_grad():
        means = [sum(own) / len(gradients) for own in zip(*gradients, strict=True)]
    squares = [[(own - mean).square().sum() for own, mean in zip(one, means, strict=True)] for one in gradients]
    return torch.stack([torch.stack(own).sum() for own in squares])
