"""SelfReg, self-supervised contrastive regularisation (Kim et al., ICCV 2021, arXiv:2104.09841): positive pairs only.

    L = CE + min(CE, 1) sum_k w_k (g |u_k - P v_k|^2 + (1 - g) |u_k - (g P v_k + (1 - g) Q v_k)|^2)
    k = logits:    u = v = f(x)
    k = features:  u = z(x), v = h(z(x))

|.|^2 is the mean over images and dimensions. P and Q put in each image's place a random one of its class, of whatever
domain (itself at times): two permutations of each class. g ~ Beta(alpha, alpha), one number a step; min(CE, 1) is a
constant. h, the class-specific domain perturbation layer, is a perceptron with BatchNorm, and is applied to the
partners alone.

Deviations: in DomainBed h is made after the optimizer and so never trained (its issue 62; the published numbers were
made so); `train_projection: false` does that. The authors' own code trains it, as here. The pairs have the same
distribution as DomainBed's, but are other draws: one permutation of the whole batch, restricted to each class, so that
the host need not know the classes' sizes. DomainBed sorts the images by class before the network, which dropout alone
notices. The paper's weight averaging and inter-domain curriculum are no part of this loss, as in DomainBed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.algorithms.base import Algorithm
from gsdg.batch import Batch, join
from gsdg.errors import check_range


class SelfReg(Algorithm):
    """logit_weight, feature_weight: w of the logits' and of the features' distances. alpha: of the Beta distribution.

    train_projection: false leaves h as it was drawn.
    """

    needs = "2 images a step, for its BatchNorm"
    no_surgery = "it pairs images of a class across domains"

    def __init__(self, *, logit_weight: float, feature_weight: float, alpha: float, train_projection: bool) -> None:
        super().__init__()
        check_range("algorithm", "[0, inf)", logit_weight=logit_weight, feature_weight=feature_weight)
        check_range("algorithm", "(0, inf)", alpha=alpha)
        self.logit_weight, self.feature_weight, self.alpha = logit_weight, feature_weight, alpha
        self.train_projection = train_projection

    def setup(self, model: nn.Module, domains: Sequence[str]) -> None:
        super().setup(model, domains)
        some = next(model.parameters())
        self.projection = projection(model.features).to(some.device, some.dtype)
        self.projection.requires_grad_(self.train_projection)

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        joint = join(batches)
        features = self.model.featurize(joint.images)
        logits, projected = self.model.head(features), self.projection(features)
        nll = F.cross_entropy(logits, joint.labels)
        mix, pairs = np.random.beta(self.alpha, self.alpha), [partners(joint.labels) for _ in range(2)]
        penalty = self.logit_weight * dissimilarity(logits, logits, pairs, mix)
        penalty = penalty + self.feature_weight * dissimilarity(features, projected, pairs, mix)
        loss = nll + nll.detach().clamp(max=1) * penalty
        loss.backward()
        return {"loss": loss.detach(), "nll": nll.detach(), "penalty": penalty.detach()}


def partners(labels: Tensor) -> Tensor:
    """labels [N] -> [N] int64: a permutation of the batch that keeps the labels, all of those equally likely."""
    grouped = labels.argsort(stable=True)
    drawn = torch.randperm(len(labels), device=labels.device)
    shuffled = drawn[labels[drawn].argsort(stable=True)]  # the same classes at the same places, each in random order
    return shuffled[grouped.argsort()]


def dissimilarity(rows: Tensor, others: Tensor, pairs: Sequence[Tensor], mix: float) -> Tensor:
    """rows, others [N, K] -> the distance to one partner and that to a mixture of two, mixed themselves, 0-dim."""
    first, second = (others[pair] for pair in pairs)
    individual = F.mse_loss(rows, first)
    heterogeneous = F.mse_loss(rows, mix * first + (1 - mix) * second)
    return mix * individual + (1 - mix) * heterogeneous


def projection(features: int) -> nn.Module:
    """[N, features] -> the same; N is 2 or more, for BatchNorm."""
    hidden = features if features == 2048 else 2 * features
    sizes = [(features, hidden), (hidden, hidden), (hidden, features)]
    blocks = [module for size in sizes for module in (nn.Linear(*size), nn.BatchNorm1d(size[1]), nn.ReLU())]
    return nn.Sequential(*blocks[:-1])
