"""Empirical risk minimisation (Vapnik, 1998): the mean cross-entropy over all images of the source domains.

    min_theta  1 / (D B)  sum_d sum_b  CE(f_theta(x_db), y_db)

As in DomainBed, the D minibatches go through the network in one joint batch, concatenated in domain order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.common.micro_batches import cross_entropy_terms
from gsdg.types import Batch, join


class ERM(Algorithm):
    """Cross-entropy on all source domains together. No hyper-parameters."""

    takes_micro_batches = True
    takes_loss_scaling = True
    no_surgery = "for ERM with surgery choose algorithm=grad_surgery, pcgrad, ..., and algorithm/rule"

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        joint = join(batches)
        total = torch.zeros((), device=joint.images.device)
        for term in cross_entropy_terms(self.model, joint.images, joint.labels, self.micro_batch_size):
            self.scaled(term).backward()
            total = total + term.detach()
        return {"loss": total}
