"""Empirical risk minimisation (Vapnik, 1998): the mean cross-entropy over all sources' images.

    min_theta  1 / (D B)  sum_d sum_b  CE(f_theta(x_db), y_db)

As in DomainBed, the D minibatches go through the network as one, concatenated in domain order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms.base import Algorithm
from gsdg.batch import Batch


class ERM(Algorithm):
    """No hyper-parameters."""

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        images = torch.cat([batch.images for batch in batches])  # [D * B, C, H, W]
        labels = torch.cat([batch.labels for batch in batches])  # [D * B]
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        return {"loss": loss.detach()}
