"""SAGM, sharpness-aware gradient matching (Wang et al., CVPR 2023, arXiv:2303.10353).

    min_theta  1/2 L(theta) + 1/2 L(theta + rho g / |g| - alpha g),   g = grad L(theta)

L is ERM's loss of all sources, |.| the norm over all parameters. To descend before the ascent, -alpha g, rewards
gradients that agree at both weights: the first-order expansion in alpha holds their inner product. rho = alpha = 0 is
ERM, alpha = 0 the mean of ERM and SAM.

Deviations: DomainBed has no SAGM. From the authors' code: it comes back by subtracting, counts a batch twice in
BatchNorm's `num_batches_tracked`, and returns L(theta) as the loss. The paper's objective has no factors 1/2, its code
has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.elsewhere import elsewhere, with_gradient
from gsdg.algorithms.sam import EPS, move
from gsdg.batch import Batch, join
from gsdg.errors import check_range


class SAGM(Algorithm):
    """rho: how far the weights are moved up the gradient. alpha: of the step down it that precedes."""

    no_surgery = "half of its gradient is taken at weights that all sources together have moved"

    def __init__(self, *, rho: float, alpha: float) -> None:
        super().__init__()
        check_range("algorithm", "[0, inf)", rho=rho, alpha=alpha)
        self.rho, self.alpha = rho, alpha

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        joint = join(batches)
        nll = F.cross_entropy(self.model(joint.images), joint.labels)
        nll.backward()
        weights, gradients = with_gradient(self.model)
        with elsewhere(self.model, weights):
            move(weights, gradients, self.rho / (torch.nn.utils.get_total_norm(gradients) + EPS) - self.alpha)
            perturbed = F.cross_entropy(self.model(joint.images), joint.labels)
            perturbed.backward()  # adds to the gradients
        torch._foreach_mul_([weight.grad for weight in weights], 0.5)
        nll, perturbed = nll.detach(), perturbed.detach()
        return {"loss": (nll + perturbed) / 2, "nll": nll, "perturbed": perturbed}
