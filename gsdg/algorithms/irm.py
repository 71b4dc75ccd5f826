"""IRM, invariant risk minimisation (Arjovsky et al., 2019, arXiv:1907.02893), the practical objective IRMv1.

    L_d = R_d(f) + w(t) g_1 g_2,   g_k = d/ds R_d,k(s f) at s = 1

R_d,1 and R_d,2 are the mean cross-entropies of the even and of the odd images of domain d: the product of the two
slopes is an unbiased estimate of the squared slope that the paper penalises. w(t) is 1 before `anneal_steps` steps,
then `penalty_weight`.

Deviations: none from DomainBed. The authors' code divides the whole loss by the penalty's weight where that is above
1, penalises the squared slope of a whole batch, and adds an L2 term on the weights (here the optimizer's).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from gsdg.algorithms.annealing import Annealing
from gsdg.algorithms.domain_losses import DomainLosses
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.algorithms.risks import risks
from gsdg.batch import Batch, join
from gsdg.errors import check_range


class IRM(DomainLosses):
    """penalty_weight: of the squared slope, once `anneal_steps` steps are done; before that it is 1."""

    def __init__(self, *, penalty_weight: float, anneal_steps: int, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, inf)", penalty_weight=penalty_weight)
        self.annealing = Annealing(steps=anneal_steps, before=1.0, after=penalty_weight)

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        joint = join(batches)
        logits = self.model(joint.images)
        pairs = zip(joint.split(logits), joint.split(joint.labels), strict=True)
        nll, penalties = torch.stack(risks(logits, joint)), torch.stack([slopes(own, labels) for own, labels in pairs])
        losses = nll + self.annealing.weight * penalties
        return list(losses), {"nll": nll.mean(), "penalty": penalties.mean()}

    def step(self, optimizer: Optimizer) -> None:
        self.annealing.step(optimizer)


def slopes(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [B, classes] -> the product of the slopes of both halves' risks in a scale of the logits, 0-dim."""
    scale = torch.ones((), dtype=logits.dtype, device=logits.device, requires_grad=True)
    halves = [F.cross_entropy(logits[k::2] * scale, labels[k::2]) for k in (0, 1)]
    first, second = (torch.autograd.grad(half, scale, create_graph=True)[0] for half in halves)
    return first * second
