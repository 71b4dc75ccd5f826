"""MMD, CORAL and CausIRL: the features of the domains, or of two random mixtures of them, should have one distribution.

    L = CE + w * 2 / (D (D - 1))  sum_{d<e}  d(features of domain d, features of domain e)        MMD, CORAL
    L = CE + w * d(features of P, features of Q)                                                  CausIRL

w is `penalty_weight`, and d is one of two distances (`common/distances.py`):

- MMD, maximum mean discrepancy (Li et al., CVPR 2018): d = k(d, d) + k(e, e) - 2 k(d, e), where k(d, e) is the mean
  over images x of domain d and y of domain e of sum_g exp(-g |f(x) - f(y)|^2), over seven g from 0.001 to 1000.
- CORAL, correlation alignment (Sun and Saenko, ECCV workshops 2016, arXiv:1607.01719): d = |m_d - m_e|^2 / F +
  |C_d - C_e|_F^2 / F^2, with the mean m_d and the covariance C_d of the F features of domain d's minibatch.

CausIRL (invariant causal mechanisms, Chevalley et al., 2022, arXiv:2206.11646) compares two mixtures of the domains,
P = union_d {x_d1, ..., x_dc_d} and Q = the other images, with c_d ~ U{0, ..., B - 1}. They contain the domains in
random proportions: if no two mixtures can be told apart, no two domains can. The penalty is 0 if P or Q has fewer than
two images.

The D minibatches go through the network in one joint batch, as in ERM. DomainBed makes one forward pass per domain,
which is different only if BatchNorm is in train mode.

Deviations from the authors: MMD-AAE penalises the MMD between the codes of an autoencoder, together with a
reconstruction loss and an adversary that matches the codes to a prior; DomainBed and this file use the MMD alone.
CORAL adapts one source to one target by the covariances of the logits alone, and divides by 4 F^2. CausIRL: none;
DomainBed's code is by its first author.
Deviations from DomainBed: in float32 its |x - x|^2 is not exactly 0 because of rounding, which matters for g = 1000.
Its gradient is off by 1% for features as large as a ResNet-50's, and by more when the features have become similar.
Here the distance is exactly 0; in float64 both are the same. CORAL refuses a minibatch of one image per domain, whose
covariance is 0 / 0 in DomainBed.

There is a class per method, not an argument, because the name of the class is part of the run id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.common.distances import gaussian_mmd, moment_distance
from gsdg.types import Batch, join
from gsdg.utils.errors import check_range


class Matching(Algorithm):
    """ERM plus the distance between the feature distributions of the domains, or of two random mixtures of them.

    Args:
        penalty_weight: w, weight of the distance, >= 0; DomainBed's `mmd_gamma`.
    """

    min_domains = 2
    takes_loss_scaling = True
    no_surgery = "its penalty is computed for all pairs of domains at once, not per domain"
    acts_on_features = "penalises the distance between the features of the domains"
    distance: ClassVar[Callable[[Sequence[Tensor]], Tensor]]  # groups of rows [n_i, F] -> mean over their pairs, 0-dim
    mixtures: ClassVar[bool] = False

    def __init__(self, *, penalty_weight: float) -> None:
        super().__init__()
        check_range("algorithm", "[0, inf)", penalty_weight=penalty_weight)
        self.penalty_weight = penalty_weight

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        joint = join(batches)
        features = self.model.featurize(joint.images)
        nll = F.cross_entropy(self.model.head(features), joint.labels)
        penalty = self.penalty(joint.split(features))
        loss = nll + self.penalty_weight * penalty
        self.scaled(loss).backward()
        return {"loss": loss.detach(), "nll": nll.detach(), "penalty": penalty.detach()}

    def penalty(self, features: Sequence[Tensor]) -> Tensor:
        """The penalty, 0-dim, of the features [B_d, F] of each domain, in domain order."""
        groups = random_mixtures(features) if self.mixtures else features
        if self.mixtures and min(map(len, groups)) < 2:
            return features[0].new_zeros(())
        return self.distance(groups)


class MMD(Matching):
    """The squared MMD of the features of every two domains, see `Matching`."""

    distance = staticmethod(gaussian_mmd)


class CORAL(Matching):
    """The distance between means and covariances of the features of every two domains, see `Matching`."""

    distance = staticmethod(moment_distance)
    needs = "2 images per domain"


class CausIRLMMD(Matching):
    """The squared MMD of the features of two random mixtures of the domains, see `Matching`."""

    distance = staticmethod(gaussian_mmd)
    mixtures = True
    no_surgery = "its penalty compares random mixtures of the domains"


class CausIRLCORAL(CausIRLMMD):
    """The distance between means and covariances of two random mixtures of the domains, see `Matching`."""

    distance = staticmethod(moment_distance)


def random_mixtures(features: Sequence[Tensor]) -> list[Tensor]:
    """[first parts, second parts] of the features [B_d, F] of each domain, split in two at a random row.

    As in DomainBed, the second part of a domain has at least 1 row.
    """
    cuts = [np.random.randint(0, len(rows)) for rows in features]
    first = torch.cat([rows[:cut] for rows, cut in zip(features, cuts, strict=True)])
    second = torch.cat([rows[cut:] for rows, cut in zip(features, cuts, strict=True)])
    return [first, second]
