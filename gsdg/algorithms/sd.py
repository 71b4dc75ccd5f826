"""SD, spectral decoupling, against gradient starvation (Pezeshki et al., NeurIPS 2021, arXiv:2011.09468).

    min_theta  mean_d [ R_d + w P_d ]

R_d is the mean cross-entropy of domain d, P_d the mean of its squared logits, over images and classes.

Deviations: none from DomainBed. The paper penalises lambda/2 |f(x)|^2, a sum over the logits of an image; DomainBed
uses their mean, so that w is lambda C / 2 for C classes. The authors' code is for one logit per image and has no factor
1/2; for CelebA it penalises the distance of the logit from a class-specific value instead of from 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsdg.algorithms.common.domain_losses import DomainLosses
from gsdg.algorithms.common.domain_risks import risks_from_logits
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.types import Batch, join
from gsdg.utils.errors import check_range


class SD(DomainLosses):
    """The domain risks plus an L2 penalty on the logits.

    Args:
        penalty_weight: w, weight of the mean squared logit, >= 0.
        surgery: gradient surgery on the domains' losses, or None.
    """

    takes_loss_scaling = True

    def __init__(self, *, penalty_weight: float, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, inf)", penalty_weight=penalty_weight)
        self.penalty_weight = penalty_weight

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        joint = join(batches)
        logits = self.model(joint.images)
        nll = torch.stack(risks_from_logits(logits, joint))
        penalties = torch.stack([domain_logits.square().mean() for domain_logits in joint.split(logits)])
        losses = nll + self.penalty_weight * penalties
        return list(losses), {"nll": nll.mean(), "penalty": penalties.mean()}
