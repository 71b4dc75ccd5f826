"""GroupDRO, group distributionally robust optimisation (Sagawa et al., ICLR 2020, arXiv:1911.08731); groups: domains.

    q_d <- q_d exp(eta R_d) / sum_e q_e exp(eta R_e)        q_d = 1 / D at the start
    min_theta  sum_d q_d R_d                                q held constant

R_d is the mean cross-entropy of domain d; the weights are raised before they are used. As one loss a domain, whose mean
this is: L_d = D q_d R_d.

Deviations: log q is kept in place of q, in which a weight that has underflown to 0 could never rise again, as in
DomainBed and in the authors' code; DomainBed forwards the domains one by one, which differs where BatchNorm takes
statistics. The authors' code samples the groups evenly on request and may add a generalisation adjustment, both absent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from gsdg.algorithms.domain_losses import DomainLosses
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.algorithms.risks import domain_risks
from gsdg.batch import Batch
from gsdg.errors import check_range


class GroupDRO(DomainLosses):
    """eta: how fast the weights move toward the domains with the highest risks; 0 leaves them equal."""

    needs_domains = 2

    def __init__(self, *, eta: float, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "[0, inf)", eta=eta)
        self.eta = eta

    def setup(self, model: nn.Module, domains: Sequence[str]) -> None:
        like = next(model.parameters())
        self.register_buffer("log_q", like.new_full((len(domains),), -math.log(len(domains))))
        super().setup(model, domains)

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        risks = domain_risks(self.model, batches)
        self.log_q.copy_((self.log_q + self.eta * risks.detach()).log_softmax(0))
        losses = len(risks) * self.log_q.exp() * risks
        return list(losses), {"nll": risks.mean(), "worst": risks.max(), "largest_weight": self.log_q.max().exp()}
