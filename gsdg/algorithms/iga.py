"""IGA, inter-environmental gradient alignment (Koyama and Yamaguchi, 2020, arXiv:2008.01883).

    min_theta  mean_d R_d + w sum_d |g_d - g|^2        g_d = grad R_d,  g = mean_d g_d

R_d is the mean cross-entropy of domain d. The gradient of the penalty is 2 sum_d H_d (g_d - g), with the Hessians H_d:
what g itself would contribute, -2 H sum_d (g_d - g), is zero, so that g may be held constant.

Each domain has a forward of its own, as in DomainBed: D backward passes through a joint graph would cost D times more.

Deviations: none from DomainBed, whose missing create_graph on g changes nothing, as shown above. The paper's penalty is
the trace of the variance, the mean over domains where this is the sum: its lambda is D times our weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms.base import Algorithm
from gsdg.batch import Batch
from gsdg.errors import check_range


class IGA(Algorithm):
    """penalty_weight: of the domains' squared distances from the mean gradient."""

    needs_domains = 2
    no_surgery = "its penalty compares the gradients of all domains"

    def __init__(self, *, penalty_weight: float) -> None:
        super().__init__()
        check_range("algorithm", "[0, inf)", penalty_weight=penalty_weight)
        self.penalty_weight = penalty_weight

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        risks = [F.cross_entropy(self.model(batch.images), batch.labels) for batch in batches]
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        nll, penalty = torch.stack(risks).mean(), scatter([gradients(risk, parameters) for risk in risks])
        loss = nll + self.penalty_weight * penalty
        loss.backward()
        return {"loss": loss.detach(), "nll": nll.detach(), "penalty": penalty.detach()}


def gradients(risk: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """One a parameter, with a graph; zeros for one that the risk does not depend on."""
    return torch.autograd.grad(risk, parameters, create_graph=True, materialize_grads=True)


def scatter(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """D gradients, one tensor a parameter -> the sum of their squared distances from their mean, 0-dim."""
    with torch.no_grad():
        means = [sum(own) / len(gradients) for own in zip(*gradients, strict=True)]
    return sum((own - mean).square().sum() for one in gradients for own, mean in zip(one, means, strict=True))
