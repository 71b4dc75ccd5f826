"""CDANN, conditional invariant adversarial networks (Li et al., ECCV 2018), in DomainBed's form: DANN given the class.

    V = 1/N sum_i CE(h(f(x_i)), y_i) - w U,   U = sum_i 1 / (C n(y_i)) CE(D(f(x_i) + e(y_i)), d_i) + DANN's penalty

The discriminator D gets the features plus an embedding e of the class, which is trained together with D. n(y) is the
number of images of class y among the N images, so that each of the C classes has the same weight in U; a class without
images does not contribute.

Deviations from DomainBed: it uses the highest label in the batch plus 1 as C, which increases all weights if the last
classes have no images; here C is the number of classes.
Deviations from the paper: it has one discriminator per class and one for all classes, and only the loss of the latter
is weighted, by the class counts within each domain. It uses gradient reversal, as DANN's authors do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.algorithms.dann import DANN
from gsdg.models.classifier import Classifier


class CDANN(DANN):
    """DANN with a discriminator that is given the class. The hyper-parameters are DANN's.

    The discriminator's settings also apply to the class embeddings.
    """

    def setup(self, model: Classifier, domains: Sequence[str]) -> None:
        super().setup(model, domains)
        self.embeddings = nn.Embedding(model.classes, model.features).to(next(model.parameters()))

    def disc_inputs(self, features: Tensor, classes: Tensor) -> Tensor:
        return features + self.embeddings(classes)

    def domain_loss(self, logits: Tensor, domains: Tensor, classes: Tensor) -> Tensor:
        counts = (classes[:, None] == classes).sum(1)  # [N], images of the same class
        return (F.cross_entropy(logits, domains, reduction="none") / (counts * self.model.classes)).sum()
