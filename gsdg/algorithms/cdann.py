"""CDANN, conditional invariant adversarial networks (Li et al., ECCV 2018), in DomainBed's form: DANN given the class.

    V = 1/N sum_i CE(h(f(x_i)), y_i) - w U,   U = sum_i 1 / (C n(y_i)) CE(D(f(x_i) + e(y_i)), d_i) + DANN's penalty

One discriminator D sees the features plus an embedding e of the class, learnt with it. n(y) of the N images are of
class y: each of the C classes has the same share in U; one without images has none.

Deviations: DomainBed takes for C the highest label in the batch plus 1, and so enlarges all weights where the last
classes have no images; here it is the number of classes. The paper has a discriminator a class, and one for all of
them; only that one's loss is weighted, by the counts within each domain. It reverses the gradient, as DANN's does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.algorithms.dann import DANN


class CDANN(DANN):
    """The hyper-parameters are DANN's; the embeddings are trained as the discriminator is."""

    def setup(self, model: nn.Module, domains: Sequence[str]) -> None:
        super().setup(model, domains)
        self.embeddings = nn.Embedding(model.classes, model.features).to(next(model.parameters()))

    def disc_inputs(self, features: Tensor, labels: Tensor) -> Tensor:
        return features + self.embeddings(labels)

    def domain_loss(self, logits: Tensor, domains: Tensor, labels: Tensor) -> Tensor:
        counts = (labels[:, None] == labels).sum(1)  # [N]: images of the same class
        return (F.cross_entropy(logits, domains, reduction="none") / (counts * self.model.classes)).sum()
