"""GGA-L, noise where the domain gradients disagree (Ballas & Diou, CVPR 2025, arXiv:2502.20162, supplement):
gradient-guided annealing with Langevin-like updates.

    gradient = grad L(theta) + gamma (1 - s) xi,   s = mean over pairs of domains of cos(grad L_i, grad L_j)

L is ERM's loss over all source domains, L_d that of one domain. The cosine is that of the gradients of all parameters
together, and xi is noise with one independent value per weight.

Deviations: DomainBed has no GGA-L. In the authors' README xi is uniform on [0, 1), which also pushes all weights down;
in their code, which is followed here, it is standard normal. They compute ERM's gradient in a separate pass; here it is
the sum of the domain gradients, at half the cost. The result is the same unless BatchNorm is in train mode, which then
normalises each domain separately. The title of their algorithm mentions the minimum of the cosines; formula and code
use the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.common.perturbed_weights import parameters_with_gradient
from gsdg.types import Batch
from gsdg.utils.errors import check_literal, check_range

Noise = Literal["normal", "uniform"]
EPS = 1e-8  # lower bound of a product of norms: a domain gradient of zero has cosine 0 with all others


class GGAL(Algorithm):
    """ERM plus noise on the gradient, scaled by how much the domain gradients disagree.

    Args:
        gamma: scale of the noise if the domain gradients are orthogonal, >= 0.
        noise: distribution of the noise: `normal`, standard normal, or `uniform` on [0, 1).
    """

    min_domains = 2
    no_surgery = "it adds noise to the mean gradient, scaled by the disagreement of the domain gradients"

    def __init__(self, *, gamma: float, noise: Noise = "normal") -> None:
        super().__init__()
        check_literal("algorithm.noise", noise, Noise)
        check_range("algorithm", "[0, inf)", gamma=gamma)
        self.gamma, self.draw = gamma, {"normal": torch.randn_like, "uniform": torch.rand_like}[noise]

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        # Each domain's share of ERM's loss: the shares sum to ERM's loss, and scaling changes no cosine.
        n_images = sum(len(batch.labels) for batch in batches)
        losses, domain_gradients = [], []
        for batch in batches:
            self.model.zero_grad(set_to_none=True)
            losses.append(len(batch.labels) / n_images * F.cross_entropy(self.model(batch.images), batch.labels))
            losses[-1].backward()
            weights, gradients = parameters_with_gradient(self.model)
            domain_gradients.append(torch.cat([gradient.flatten() for gradient in gradients]))
        similarity = mean_cosine(domain_gradients)
        noise = self.gamma * (1 - similarity)
        # The sum of the noise and the gradient has the memory format of the weight, as fused optimizers require.
        erm_gradients = sum(domain_gradients).split([weight.numel() for weight in weights])
        for weight, gradient in zip(weights, erm_gradients, strict=True):
            weight.grad = (noise * self.draw(weight)).add_(gradient.view_as(weight))
        return {"loss": sum(losses).detach(), "similarity": similarity, "noise": noise}


def mean_cosine(gradients: Sequence[Tensor]) -> Tensor:
    """The mean cosine over all pairs of D gradients [P], 0-dim."""
    norms = [gradient.norm() for gradient in gradients]
    pairs = list(combinations(range(len(gradients)), 2))
    cosines = [gradients[i].dot(gradients[j]) / (norms[i] * norms[j]).clamp_min(EPS) for i, j in pairs]
    return torch.stack(cosines).mean()
