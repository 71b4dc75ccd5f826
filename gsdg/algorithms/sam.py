"""SAM, sharpness-aware minimisation (Foret et al., ICLR 2021, arXiv:2010.01412).

    min_theta  L(theta + rho g / |g|),   g = grad L(theta)

L is ERM's loss of all sources, |.| the norm over all parameters; the minimiser's gradient is taken at the ascended
weights, as if these did not depend on theta. rho = 0 is ERM.

Deviations: DomainBed has no SAM. Its SWAD fork updates BatchNorm's statistics at both weights, and comes back by
subtracting; the widely used PyTorch code (davda54/sam) does as is done here. The authors' code, in JAX, was not read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.elsewhere import elsewhere, with_gradient
from gsdg.batch import Batch, join
from gsdg.errors import check_range

EPS = 1e-12  # of the norm: at a gradient of zero there is nothing to ascend


class SAM(Algorithm):
    """rho: how far the weights are moved up the gradient."""

    no_surgery = "its gradient is taken at weights that all sources together have moved"

    def __init__(self, *, rho: float) -> None:
        super().__init__()
        check_range("algorithm", "[0, inf)", rho=rho)
        self.rho = rho

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        joint = join(batches)
        nll = F.cross_entropy(self.model(joint.images), joint.labels)
        nll.backward()
        weights, gradients = with_gradient(self.model)
        with elsewhere(self.model, weights):
            move(weights, gradients, self.rho / (torch.nn.utils.get_total_norm(gradients) + EPS))
            self.model.zero_grad(set_to_none=True)
            loss = F.cross_entropy(self.model(joint.images), joint.labels)
            loss.backward()
        return {"loss": loss.detach(), "nll": nll.detach()}


@torch.no_grad()
def move(weights: Sequence[Tensor], along: Sequence[Tensor], scale: Tensor) -> None:
    """weights += scale * along, in place; scale is 0-dim."""
    torch._foreach_add_(weights, torch._foreach_mul(along, scale))
