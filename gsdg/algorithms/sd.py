"""SD, spectral decoupling, against gradient starvation (Pezeshki et al., NeurIPS 2021, arXiv:2011.09468).

    min_theta  mean_d [ R_d + w P_d ]

R_d is the mean cross-entropy of domain d, P_d the mean of its squared logits, over images and classes.

Deviations: none from DomainBed. The paper penalises lambda/2 |f(x)|^2, a sum over the logits of an image; DomainBed
takes their mean, so that w is lambda C / 2 for C classes. The authors' code is for one logit an image and has no 1/2;
for CelebA it pulls the logit to a value of each class's own instead of to 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsdg.algorithms.domain_losses import DomainLosses
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.algorithms.risks import risks
from gsdg.batch import Batch, join
from gsdg.errors import check_range


class SD(DomainLosses):
    """penalty_weight: of the mean squared logit."""

    def __init__(self, *, penalty_weight: float, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, inf)", penalty_weight=penalty_weight)
        self.penalty_weight = penalty_weight

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        joint = join(batches)
        logits = self.model(joint.images)
        nll = torch.stack(risks(logits, joint))
        penalties = torch.stack([own.square().mean() for own in joint.split(logits)])
        losses = nll + self.penalty_weight * penalties
        return list(losses), {"nll": nll.mean(), "penalty": penalties.mean()}
