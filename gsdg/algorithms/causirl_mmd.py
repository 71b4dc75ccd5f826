"""CausIRL with MMD, invariant causal mechanisms (Chevalley et al., 2022, arXiv:2206.11646): MMD of random mixtures.

    L = CE + w * MMD^2(P, Q),   P = union_d {x_d1, ..., x_dc_d},   Q = the other images,   c_d ~ U{0, ..., B - 1}

P and Q mix the domains in random proportions: if no mixture can be told from another, neither can two domains. The MMD
is that of `mmd.py`; w is `penalty_weight`. The penalty is 0 where P or Q has fewer than two images.

Deviations: none from DomainBed, whose code is by the first author, but the float32 distances of `mmd.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gsdg.algorithms.distances import gaussian_mmd
from gsdg.algorithms.matching import Matching, between_random_parts


class CausIRLMMD(Matching):
    """penalty_weight: of the squared MMD of two random mixtures of the domains."""

    no_surgery = "its penalty compares random mixtures of the domains"

    def penalty(self, features: Sequence[Tensor]) -> Tensor:
        return between_random_parts(gaussian_mmd, features)
