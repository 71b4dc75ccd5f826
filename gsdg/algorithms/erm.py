"""Empirical risk minimisation (Vapnik, 1998): the mean cross-entropy over all images of the source domains.

    min_theta  1 / (D B)  sum_d sum_b  CE(f_theta(x_db), y_db)

As in DomainBed, the D minibatches go through the network in one joint batch, concatenated in domain order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms.base import Algorithm
from gsdg.types import Batch, join


class ERM(Algorithm):
    """Cross-entropy on all source domains together. No hyper-parameters."""

    no_surgery = "for ERM with surgery choose algorithm=grad_surgery, pcgrad, ..., and algorithm/rule"

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        joint = join(batches)
        loss = F.cross_entropy(self.model(joint.images), joint.labels)
        loss.backward()
        return {"loss": loss.detach()}
