"""Empirical risk minimisation (Vapnik, 1998): the mean cross-entropy over all sources' images.

    min_theta  1 / (D B)  sum_d sum_b  CE(f_theta(x_db), y_db)

As in DomainBed, the D minibatches go through the network as one, concatenated in domain order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms.base import Algorithm
from gsdg.batch import Batch, join


class ERM(Algorithm):
    """No hyper-parameters."""

    no_surgery = "ERM with surgery is algorithm=grad_surgery, pcgrad, ...: choose that, and algorithm/rule"

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        joint = join(batches)
        loss = F.cross_entropy(self.model(joint.images), joint.labels)
        loss.backward()
        return {"loss": loss.detach()}
