"""IB-ERM, ERM with an information bottleneck (Ahuja et al., NeurIPS 2021, arXiv:2106.06607).

    min_theta  mean_d [ R_d + w V_d ],    V_d = 1 / F  sum_f var_b Phi_f(x_db)

R_d is the mean cross-entropy of domain d. V_d is the variance of the features Phi over the images of its minibatch, the
mean over the F features: an upper bound of their entropy grows with it.

Deviations from DomainBed: the variance is divided by B instead of B - 1, so that a minibatch may have one image; the
penalty counts from the first step and not from step 500 on.
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


class IBERM(DomainLosses):
    """The domain risks plus a penalty on the variance of the features.

    Args:
        penalty_weight: w, weight of the mean variance of the features, >= 0.
        surgery: gradient surgery on the domains' losses, or None.
    Raises:
        UserError: for a negative weight.
    """

    takes_loss_scaling = True
    acts_on_features = "penalises the variance of the features"

    def __init__(self, *, penalty_weight: float, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, inf)", penalty_weight=penalty_weight)
        self.penalty_weight = penalty_weight

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        joint = join(batches)
        features = self.model.featurize(joint.images)  # [N, F], the images of all domains
        nll = torch.stack(risks_from_logits(self.model.head(features), joint))  # [D]
        variances = torch.stack([rows.var(dim=0, correction=0).mean() for rows in joint.split(features)])  # [D]
        losses = nll + self.penalty_weight * variances
        return list(losses), {"nll": nll.mean(), "penalty": variances.mean()}
