"""SAM, sharpness-aware minimisation (Foret et al., ICLR 2021, arXiv:2010.01412).

    min_theta  L(theta + rho g / |g|),   g = grad L(theta)

L is ERM's loss over all source domains, |.| the norm over all parameters. The gradient is taken at the perturbed
weights, as if the perturbation did not depend on theta. rho = 0 is ERM.

Deviations: DomainBed has no SAM. Its SWAD fork updates BatchNorm's running statistics in both forward passes, and
restores the weights by subtraction; the widely used PyTorch code (davda54/sam) does the same as this file. The authors'
code, in JAX, was not read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.common.perturbed_weights import parameters_with_gradient, restored_afterwards
from gsdg.types import Batch, join
from gsdg.utils.errors import check_range

EPS = 1e-12  # added to the gradient norm, for a gradient of zero


class SAM(Algorithm):
    """ERM with the gradient at weights that are perturbed in the direction in which the loss increases.

    Args:
        rho: length of the perturbation, >= 0.
    """

    no_surgery = "its gradient is taken at weights perturbed along the gradient of all source domains together"

    def __init__(self, *, rho: float) -> None:
        super().__init__()
        check_range("algorithm", "[0, inf)", rho=rho)
        self.rho = rho

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        nll, perturbed = backward_at_perturbed_weights(self.model, batches, rho=self.rho)
        return {"loss": perturbed, "nll": nll}


def backward_at_perturbed_weights(
    model: nn.Module, batches: Sequence[Batch], *, rho: float, alpha: float = 0.0, accumulate: bool = False
) -> tuple[Tensor, Tensor]:
    """Backward passes of ERM's loss L at theta and at theta + rho g / |g| - alpha g, with g = grad L(theta).

    Args:
        rho, alpha: see above.
        accumulate: whether `.grad` is the sum of both gradients afterwards, instead of the second one alone.

    Returns:
        Both losses, detached 0-dim tensors. The weights are restored.
    """
    joint = join(batches)
    loss = F.cross_entropy(model(joint.images), joint.labels)
    loss.backward()
    weights, gradients = parameters_with_gradient(model)
    with restored_afterwards(model, weights):
        scale = rho / (torch.nn.utils.get_total_norm(gradients) + EPS) - alpha
        with torch.no_grad():
            torch._foreach_add_(weights, torch._foreach_mul(gradients, scale))
        if not accumulate:
            model.zero_grad(set_to_none=True)
        perturbed = F.cross_entropy(model(joint.images), joint.labels)
        perturbed.backward()
    return loss.detach(), perturbed.detach()
