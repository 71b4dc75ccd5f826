"""CORAL, correlation alignment (Sun and Saenko, ECCV workshops 2016, arXiv:1607.01719), as DomainBed has it.

    L = CE + w * 2 / (D (D - 1))  sum_{d<e}  ( |m_d - m_e|^2 / F  +  |C_d - C_e|_F^2 / F^2 )

m_d and C_d are the mean and the covariance of the F features of domain d's minibatch; w is `penalty_weight`.

Deviations: a minibatch of one image a domain, whose covariance is 0 / 0 in DomainBed, is refused; no others from
DomainBed. The authors adapt one source to one target, by the logits' covariances alone, and divide by 4 F^2.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gsdg.algorithms.distances import moments
from gsdg.algorithms.matching import Matching


class CORAL(Matching):
    """penalty_weight: of the mean over pairs of domains of the distance of their means and covariances."""

    needs = "2 images of each domain"

    def penalty(self, features: Sequence[Tensor]) -> Tensor:
        return moments(features)
