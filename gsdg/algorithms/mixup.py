"""Mixup between domains (Yan et al., 2020, arXiv:2001.00677; Xu et al., AAAI 2020, arXiv:1912.01805).

    x = l x_i + (1 - l) x_j,   l ~ Beta(alpha, alpha)
    L = 1 / D  sum over pairs of domains (i, j) of  l CE(f(x), y_i) + (1 - l) CE(f(x), y_j)

In every step the domains are put in a random cyclic order, and each domain is mixed with the next one, image by image,
with one l per pair; if their minibatches differ in length, the longer one is cut.

Deviations: none from DomainBed, except that the D mixed minibatches go through the network in one joint batch. Both
papers adapt to an unlabelled target domain, which is not available here: they mix source and target images, with
predicted labels or domain labels, and additionally constrain features and a discriminator. The search of the SWAD fork
draws 0.1 for every alpha.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gsdg.algorithms.base import Algorithm
from gsdg.types import Batch
from gsdg.utils.errors import check_range


class Mixup(Algorithm):
    """Cross-entropy on convex combinations of images of two domains.

    Args:
        alpha: parameter of the Beta distribution, > 0; near 0 images are hardly mixed, at 1 all shares are equally
            likely.
    """

    min_domains = 2
    takes_loss_scaling = True
    no_surgery = "each of its losses belongs to two domains"

    def __init__(self, *, alpha: float) -> None:
        super().__init__()
        check_range("algorithm", "(0, inf)", alpha=alpha)
        self.alpha = alpha

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        pairs = pairs_in_random_cycle(batches)
        shares = [float(np.random.beta(self.alpha, self.alpha)) for _ in pairs]
        mixed = [share * i.images + (1 - share) * j.images for share, (i, j) in zip(shares, pairs, strict=True)]
        logits = self.model(torch.cat(mixed)).split([len(images) for images in mixed])
        losses = [
            share * F.cross_entropy(pair_logits, i.labels) + (1 - share) * F.cross_entropy(pair_logits, j.labels)
            for share, pair_logits, (i, j) in zip(shares, logits, pairs, strict=True)
        ]
        loss = torch.stack(losses).mean()
        self.scaled(loss).backward()
        return {"loss": loss.detach()}


def pairs_in_random_cycle(batches: Sequence[Batch]) -> list[tuple[Batch, Batch]]:
    """Each minibatch and the next one in a random cyclic order, cut to the same length."""
    order = torch.randperm(len(batches)).tolist()
    pairs = [(batches[i], batches[j]) for i, j in zip(order, order[1:] + order[:1], strict=True)]
    lengths = [min(len(i.labels), len(j.labels)) for i, j in pairs]
    return [(cut(i, length), cut(j, length)) for (i, j), length in zip(pairs, lengths, strict=True)]


def cut(batch: Batch, length: int) -> Batch:
    return Batch(batch.images[:length], batch.labels[:length], batch.domain)
