"""CausIRL with CORAL, invariant causal mechanisms (Chevalley et al., 2022, arXiv:2206.11646): CORAL of random mixtures.

    L = CE + w * ( |m_P - m_Q|^2 / F  +  |C_P - C_Q|_F^2 / F^2 )

P and Q are the random mixtures of the domains of `causirl_mmd.py`, m and C the means and covariances of their F
features; w is `penalty_weight`. The penalty is 0 where P or Q has fewer than two images.

Deviations: none from DomainBed, whose code is by the first author.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gsdg.algorithms.distances import moments
from gsdg.algorithms.matching import Matching, between_random_parts


class CausIRLCORAL(Matching):
    """penalty_weight: of the distance of the means and covariances of two random mixtures of the domains."""

    no_surgery = "its penalty compares random mixtures of the domains"

    def penalty(self, features: Sequence[Tensor]) -> Tensor:
        return between_random_parts(moments, features)
