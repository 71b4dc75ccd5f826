"""IGA, inter-environmental gradient alignment (Koyama and Yamaguchi, 2020, arXiv:2008.01883).

    min_theta  mean_d R_d + w sum_d |g_d - g|^2        g_d = grad R_d,  g = mean_d g_d

R_d is the mean cross-entropy of domain d. The gradient of the penalty is 2 sum_d H_d (g_d - g), with the Hessians H_d:
the contribution of g itself, -2 H sum_d (g_d - g), is zero, so that g may be held constant. Written as one loss per
domain, L_d = R_d + w D |g_d - g|^2: the mean of the L_d has the value and the gradient above.

Each domain has its own forward pass, as in DomainBed: D backward passes through one joint graph would be D times as
expensive.

Deviations: none from DomainBed; its g is computed without create_graph, which changes nothing, as shown above. The
paper's penalty is the trace of the variance, a mean over the domains where this is the sum: its lambda is D times this
weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms.common.domain_losses import DomainLosses
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.types import Batch
from gsdg.utils.errors import check_range


class IGA(DomainLosses):
    """The mean risk plus a penalty on the variance of the domain gradients.

    Args:
        penalty_weight: w, weight of the sum of the squared distances of the domain gradients from their mean, >= 0.
        surgery: gradient surgery on the domains' losses, or None.
    """

    min_domains = 2
    reuses_graph = True

    def __init__(self, *, penalty_weight: float, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, inf)", penalty_weight=penalty_weight)
        self.penalty_weight = penalty_weight

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        risks = torch.stack([F.cross_entropy(self.model(batch.images), batch.labels) for batch in batches])
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        penalties = squared_distances([gradients_with_graph(risk, parameters) for risk in risks])
        losses = risks + self.penalty_weight * len(risks) * penalties
        return list(losses), {"nll": risks.mean(), "penalty": penalties.sum()}


def gradients_with_graph(risk: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """The differentiable gradient of each parameter; zeros if the risk does not depend on it."""
    return torch.autograd.grad(risk, parameters, create_graph=True, materialize_grads=True)


def squared_distances(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """The squared distance of each domain gradient from their mean, which is held constant, [D].

    Args:
        gradients: for each of D domains one tensor per parameter.
    """
    with torch.no_grad():
        means = [sum(tensors) / len(gradients) for tensors in zip(*gradients, strict=True)]
    squares = [
        [(tensor - mean).square().sum() for tensor, mean in zip(tensors, means, strict=True)] for tensors in gradients
    ]
    return torch.stack([torch.stack(terms).sum() for terms in squares])
