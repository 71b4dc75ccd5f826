"""Algorithms that add to the cross-entropy a penalty on how the domains' features differ.

    L(theta) = CE of all images + penalty_weight * penalty(features of domain 1, ..., of domain D)

As in ERM, the D minibatches go through the network as one. Here DomainBed runs it once a domain, which is another thing
only where BatchNorm is not frozen.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms.base import Algorithm
from gsdg.batch import Batch, join
from gsdg.errors import check_range


class Matching(Algorithm):
    """penalty_weight: DomainBed's mmd_gamma."""

    needs_domains = 2
    no_surgery = "its penalty is computed for all pairs of domains at once, not per domain"

    def __init__(self, *, penalty_weight: float) -> None:
        super().__init__()
        check_range("algorithm", "[0, inf)", penalty_weight=penalty_weight)
        self.penalty_weight = penalty_weight

    @abstractmethod
    def penalty(self, features: Sequence[Tensor]) -> Tensor:
        """Each domain's features [B_d, F], in order -> 0-dim."""

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        joint = join(batches)
        features = self.model.featurize(joint.images)
        nll = F.cross_entropy(self.model.head(features), joint.labels)
        penalty = self.penalty(joint.split(features))
        loss = nll + self.penalty_weight * penalty
        loss.backward()
        return {"loss": loss.detach(), "nll": nll.detach(), "penalty": penalty.detach()}


def between_random_parts(distance: Callable[[Sequence[Tensor]], Tensor], features: Sequence[Tensor]) -> Tensor:
    """CausIRL's penalty: each domain is cut in two at random; the distance between all first and all second parts.

    0 where either has fewer than 2 rows. A domain's second part has 1 row at least, as in DomainBed.
    """
    cuts = [np.random.randint(0, len(own)) for own in features]
    first = torch.cat([own[:cut] for own, cut in zip(features, cuts, strict=True)])
    second = torch.cat([own[cut:] for own, cut in zip(features, cuts, strict=True)])
    if min(len(first), len(second)) < 2:
        return first.new_zeros(())
    return distance([first, second])
