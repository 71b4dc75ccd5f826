"""GroupDRO, group distributionally robust optimisation (Sagawa et al., ICLR 2020, arXiv:1911.08731); groups: domains.

    q_d <- q_d exp(eta R_d) / sum_e q_e exp(eta R_e)        q_d = 1 / D at the start
    min_theta  sum_d q_d R_d                                q held constant

R_d is the mean cross-entropy of domain d; the weights q are updated before they are used. Written as one loss per
domain, whose mean is the loss above: L_d = D q_d R_d. With trainer.domains_per_step the weights of the domains that are
not drawn change by the normalization only.

Deviations from DomainBed and the authors' code: log q is stored instead of q, because a weight q that has underflowed
to 0 stays 0. DomainBed makes one forward pass per domain, which is different if BatchNorm is in train mode. The
authors' code has options for sampling the groups equally and for a generalization adjustment, which are not implemented
here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gsdg.algorithms.common.domain_losses import DomainLosses
from gsdg.algorithms.common.domain_risks import domain_risks
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.models.classifier import Classifier
from gsdg.types import Batch
from gsdg.utils.errors import check_range


class GroupDRO(DomainLosses):
    """A weighted mean of the domain risks, whose weights grow for the domains with the highest risks.

    Args:
        eta: step size of the weights, >= 0; with 0 they stay equal.
        surgery: gradient surgery on the domains' losses, or None.
    """

    takes_loss_scaling = True
    min_domains = 2

    log_q: Tensor  # logarithms of the weights, [D], in domain order

    def __init__(self, *, eta: float, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, inf)", eta=eta)
        self.eta = eta

    def setup(self, model: Classifier, domains: Sequence[str]) -> None:
        like = next(model.parameters())
        self.register_buffer("log_q", like.new_full((len(domains),), -math.log(len(domains))))
        super().setup(model, domains)

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        risks = domain_risks(self.model, batches)
        drawn = self.indices(batches)
        for d, risk in zip(drawn, risks.detach(), strict=True):
            self.log_q[d] += self.eta * risk
        self.log_q.copy_(self.log_q.log_softmax(0))
        losses = len(self.log_q) * torch.stack([self.log_q[d] for d in drawn]).exp() * risks
        return list(losses), {"nll": risks.mean(), "worst": risks.max(), "largest_weight": self.log_q.max().exp()}
