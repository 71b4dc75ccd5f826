"""GGA-L, noise where domains disagree (Ballas & Diou, CVPR 2025, arXiv:2502.20162, supplement): gradient-guided
annealing with Langevin-like updates.

    gradient = grad L(theta) + gamma (1 - s) xi,   s = mean over pairs of domains of cos(grad L_i, grad L_j)

L is ERM's loss of all sources, L_d one domain's, the cosine of all parameters together, xi noise of one value a weight.

Deviations: DomainBed has no GGA-L. The authors' README has xi uniform on [0, 1), which also pushes every weight down;
their code, followed here, draws it from the standard normal. It takes ERM's gradient in a pass of its own; here it is
the sum of the domains', at half the cost: the same unless BatchNorm is in train mode, which then normalises each domain
by itself. Its algorithm is titled the minimum of the cosines; formula and code take their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.elsewhere import with_gradient
from gsdg.batch import Batch
from gsdg.errors import check_literal, check_range

Noise = Literal["normal", "uniform"]
EPS = 1e-8  # of a product of norms: a domain without a gradient agrees with none


class GGAL(Algorithm):
    """gamma: the noise's size where the domains' gradients are orthogonal. noise: its distribution."""

    needs_domains = 2
    no_surgery = "it adds noise to the mean gradient, by how the domains' gradients agree"

    def __init__(self, *, gamma: float, noise: Noise = "normal") -> None:
        super().__init__()
        check_literal("algorithm.noise", noise, Noise)
        check_range("algorithm", "[0, inf)", gamma=gamma)
        self.gamma, self.draw = gamma, {"normal": torch.randn_like, "uniform": torch.rand_like}[noise]

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        images = sum(len(batch.labels) for batch in batches)
        losses, rows = [], []  # of a domain's share of ERM's loss, which leaves the cosines as they are
        for batch in batches:
            self.model.zero_grad(set_to_none=True)
            losses.append(len(batch.labels) / images * F.cross_entropy(self.model(batch.images), batch.labels))
            losses[-1].backward()
            weights, gradients = with_gradient(self.model)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        similarity = mean_cosine(rows)
        noise = self.gamma * (1 - similarity)
        joint = sum(rows).split([weight.numel() for weight in weights])
        for weight, gradient in zip(weights, joint, strict=True):
            weight.grad = (noise * self.draw(weight)).add_(gradient.view_as(weight))  # in the weight's memory layout
        return {"loss": sum(losses).detach(), "similarity": similarity, "noise": noise}


def mean_cosine(rows: Sequence[Tensor]) -> Tensor:
    """D gradients [P] -> the mean over their pairs, 0-dim."""
    norms = [row.norm() for row in rows]
    pairs = list(combinations(range(len(rows)), 2))
    cosines = [rows[i].dot(rows[j]) / (norms[i] * norms[j]).clamp_min(EPS) for i, j in pairs]
    return torch.stack(cosines).mean()
