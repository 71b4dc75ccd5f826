"""SAGM, sharpness-aware gradient matching (Wang et al., CVPR 2023, arXiv:2303.10353).

    min_theta  1/2 L(theta) + 1/2 L(theta + rho g / |g| - alpha g),   g = grad L(theta)

L is ERM's loss over all source domains, |.| the norm over all parameters. The term -alpha g rewards gradients that
agree at both weights: the first-order expansion in alpha contains their inner product. rho = alpha = 0 is ERM, alpha =
0 the mean of ERM and SAM.

Deviations: DomainBed has no SAGM. The authors' code restores the weights by subtraction, counts each batch twice in
BatchNorm's `num_batches_tracked`, and reports L(theta) as the loss. The factors 1/2 are in their code, not in the
paper's objective.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.common.perturbed_weights import parameters_with_gradient
from gsdg.algorithms.sam import backward_at_perturbed_weights
from gsdg.types import Batch
from gsdg.utils.errors import check_range


class SAGM(Algorithm):
    """The mean of ERM's gradients at the weights and at perturbed weights.

    Args:
        rho: length of the perturbation along the gradient, >= 0.
        alpha: step size of the gradient descent step that is part of the perturbation, >= 0.
    """

    no_surgery = "half of its gradient is taken at weights perturbed along the gradient of all source domains together"

    def __init__(self, *, rho: float, alpha: float) -> None:
        super().__init__()
        check_range("algorithm", "[0, inf)", rho=rho, alpha=alpha)
        self.rho, self.alpha = rho, alpha

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        nll, perturbed = backward_at_perturbed_weights(
            self.model, batches, rho=self.rho, alpha=self.alpha, accumulate=True
        )
        _, gradients = parameters_with_gradient(self.model)
        torch._foreach_mul_(gradients, 0.5)
        return {"loss": (nll + perturbed) / 2, "nll": nll, "perturbed": perturbed}
