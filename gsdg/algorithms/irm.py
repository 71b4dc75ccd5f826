"""IRM, invariant risk minimisation (Arjovsky et al., 2019, arXiv:1907.02893), the practical objective IRMv1.

    L_d = R_d(f) + w(t) g_1 g_2,   g_k = d/ds R_d,k(s f) at s = 1

R_d,1 and R_d,2 are the mean cross-entropies of the even and of the odd images of domain d: the product of the two
derivatives is an unbiased estimate of the squared derivative that the paper penalises. w(t) is 1 during the first
`anneal_steps` steps, then `penalty_weight`.

Deviations: none from DomainBed. The authors' code divides the total loss by the penalty weight if that is above 1,
penalises the squared derivative of the complete batch, and adds an L2 term on the weights (here the optimizer's weight
decay).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from gsdg.algorithms.common.annealing import Annealing
from gsdg.algorithms.common.domain_losses import DomainLosses
from gsdg.algorithms.common.domain_risks import risks_from_logits
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.types import Batch, join
from gsdg.utils.errors import check_range


class IRM(DomainLosses):
    """The domain risks plus a penalty on their derivatives with respect to a scale of the logits.

    Args:
        penalty_weight: w, weight of the penalty after `anneal_steps` steps, >= 0; before that it is 1.
        anneal_steps: number of training steps with penalty weight 1, >= 0.
        surgery: gradient surgery on the domains' losses, or None.
    """

    def __init__(self, *, penalty_weight: float, anneal_steps: int, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, inf)", penalty_weight=penalty_weight)
        self.annealing = Annealing(steps=anneal_steps, before=1.0, after=penalty_weight)

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        joint = join(batches)
        logits = self.model(joint.images)
        pairs = zip(joint.split(logits), joint.split(joint.labels), strict=True)
        nll = torch.stack(risks_from_logits(logits, joint))
        penalties = torch.stack([scale_penalty(domain_logits, labels) for domain_logits, labels in pairs])
        losses = nll + self.annealing.weight * penalties
        return list(losses), {"nll": nll.mean(), "penalty": penalties.mean()}

    def step(self, optimizer: Optimizer) -> dict[str, Tensor]:
        self.annealing.step(optimizer)
        return {}


def scale_penalty(logits: Tensor, labels: Tensor) -> Tensor:
    """The product of both halves' risk derivatives with respect to a scale of the logits [B, classes], 0-dim."""
    scale = torch.ones((), dtype=logits.dtype, device=logits.device, requires_grad=True)
    halves = [F.cross_entropy(logits[k::2] * scale, labels[k::2]) for k in (0, 1)]
    first, second = (torch.autograd.grad(half, scale, create_graph=True)[0] for half in halves)
    return first * second
