"""SelfReg, self-supervised contrastive regularisation (Kim et al., ICCV 2021, arXiv:2104.09841): positive pairs only.

    L = CE + min(CE, 1) sum_k w_k (g |u_k - P v_k|^2 + (1 - g) |u_k - (g P v_k + (1 - g) Q v_k)|^2)
    k = logits:    u = v = f(x)
    k = features:  u = z(x), v = h(z(x))

|.|^2 is the mean over images and dimensions. P and Q replace each image by a random image of its class, of any domain
(possibly itself): both are permutations within each class. g ~ Beta(alpha, alpha) is one number per step; min(CE, 1) is
held constant. h, the class-specific domain perturbation layer, is an MLP with BatchNorm, applied to the partners only.

Deviations from DomainBed: there h is created after the optimizer and therefore never trained (its issue 62; the
published numbers were made so); `train_projection: false` does the same. The authors' own code trains it, as is done
here. The pairs have the same distribution as DomainBed's but are different draws: one permutation of the joint batch,
restricted to each class, so that the class sizes are not needed on the host. DomainBed sorts the images by class before
the network, which only dropout can notice. The paper's weight averaging and inter-domain curriculum are not part of
this loss, as in DomainBed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.algorithms.base import Algorithm
from gsdg.models.classifier import Classifier
from gsdg.types import Batch, join
from gsdg.utils.errors import check_range


class SelfReg(Algorithm):
    """ERM plus distances between the logits, and between the features, of images of the same class.

    Args:
        logit_weight: w of the logits' distances, >= 0.
        feature_weight: w of the features' distances, >= 0.
        alpha: parameter of the Beta distribution, > 0.
        train_projection: whether the projection h is trained.
    """

    needs = "2 images per step, for its BatchNorm"
    takes_loss_scaling = True
    no_surgery = "it pairs images of a class across domains"

    def __init__(self, *, logit_weight: float, feature_weight: float, alpha: float, train_projection: bool) -> None:
        super().__init__()
        check_range("algorithm", "[0, inf)", logit_weight=logit_weight, feature_weight=feature_weight)
        check_range("algorithm", "(0, inf)", alpha=alpha)
        self.logit_weight, self.feature_weight, self.alpha = logit_weight, feature_weight, alpha
        self.train_projection = train_projection

    def setup(self, model: Classifier, domains: Sequence[str]) -> None:
        super().setup(model, domains)
        like = next(model.parameters())
        self.projection = perturbation_layer(model.features).to(like.device, like.dtype)
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
        self.scaled(loss).backward()
        return {"loss": loss.detach(), "nll": nll.detach(), "penalty": penalty.detach()}


def partners(labels: Tensor) -> Tensor:
    """A permutation of the batch, [N] int64, that keeps the labels [N]; all of those are equally likely."""
    by_class = labels.argsort(stable=True)
    drawn = torch.randperm(len(labels), device=labels.device)
    shuffled = drawn[labels[drawn].argsort(stable=True)]  # also sorted by class, in random order within each class
    return shuffled[by_class.argsort()]


def dissimilarity(rows: Tensor, others: Tensor, pairs: Sequence[Tensor], mix: float) -> Tensor:
    """A mixture of the squared distances from one partner and from a mixture of two partners, 0-dim.

    Args:
        rows: [N, K].
        others: the rows of which the partners are taken, [N, K].
        pairs: indices of the two partners of each row, two tensors [N].
        mix: weight of the first partner, in [0, 1].
    """
    first, second = (others[pair] for pair in pairs)
    individual = F.mse_loss(rows, first)
    heterogeneous = F.mse_loss(rows, mix * first + (1 - mix) * second)
    return mix * individual + (1 - mix) * heterogeneous


def perturbation_layer(features: int) -> nn.Module:
    """An MLP with BatchNorm, [N, features] -> [N, features], for N >= 2."""
    hidden = features if features == 2048 else 2 * features
    sizes = [(features, hidden), (hidden, hidden), (hidden, features)]
    blocks = [module for size in sizes for module in (nn.Linear(*size), nn.BatchNorm1d(size[1]), nn.ReLU())]
    return nn.Sequential(*blocks[:-1])
