"""Mixup between domains (Yan et al., 2020, arXiv:2001.00677; Xu et al., AAAI 2020, arXiv:1912.01805).

    x = l x_i + (1 - l) x_j,   l ~ Beta(alpha, alpha)
    L = 1 / D  sum over pairs of domains (i, j) of  l CE(f(x), y_i) + (1 - l) CE(f(x), y_j)

At every step the domains form a random circle, in which each is mixed with the next, image by image, with one l a pair;
of unequal minibatches the longer is cut.

Deviations: none from DomainBed, save that the D mixed minibatches go through the network as one. Both papers adapt to
an unlabelled target domain, which has no part here: they mix source and target images, with predicted labels or labels
of the domain, and constrain features and a discriminator besides. The SWAD fork's search draws 0.1 for every alpha.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms.base import Algorithm
from gsdg.batch import Batch
from gsdg.errors import check_range


class Mixup(Algorithm):
    """alpha: of the Beta distribution; near 0 it leaves images alone, at 1 all mixtures are equally likely."""

    needs_domains = 2
    no_surgery = "each of its losses belongs to two domains"

    def __init__(self, *, alpha: float) -> None:
        super().__init__()
        check_range("algorithm", "(0, inf)", alpha=alpha)
        self.alpha = alpha

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        pairs = circle(batches)
        shares = [float(np.random.beta(self.alpha, self.alpha)) for _ in pairs]
        mixed = [share * i.images + (1 - share) * j.images for share, (i, j) in zip(shares, pairs, strict=True)]
        logits = self.model(torch.cat(mixed)).split([len(images) for images in mixed])
        losses = [
            share * F.cross_entropy(own, i.labels) + (1 - share) * F.cross_entropy(own, j.labels)
            for share, own, (i, j) in zip(shares, logits, pairs, strict=True)
        ]
        loss = torch.stack(losses).mean()
        loss.backward()
        return {"loss": loss.detach()}


def circle(batches: Sequence[Batch]) -> list[tuple[Batch, Batch]]:
    """Each domain's minibatch and that of the next in a random circle of them, cut to the same length."""
    order = torch.randperm(len(batches)).tolist()
    pairs = [(batches[i], batches[j]) for i, j in zip(order, order[1:] + order[:1], strict=True)]
    return [tuple(first(batch, min(len(i.labels), len(j.labels))) for batch in (i, j)) for i, j in pairs]


def first(batch: Batch, count: int) -> Batch:
    return Batch(batch.images[:count], batch.labels[:count], batch.domain)
