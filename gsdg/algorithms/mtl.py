"""MTL, marginal transfer learning (Blanchard et al., JMLR 2021, arXiv:1711.07910): the head also gets a domain mean.

    L_d = mean_b CE(h(z_b, e_d), y_b)      e_d <- ema mean_b z_b + (1 - ema) e_d,  a gradient flows through the mean

The head is linear in the F features z_b of an image and the F numbers e_d, the mean embedding of its domain. For a
prediction, e is the mean over the images that are given together. Predictions therefore depend on
`trainer.eval_batch_size` and on the order of the images: evaluation images are shuffled.

Deviations: the paper is about kernel methods; this is DomainBed's form for neural networks. DomainBed overwrites the
embedding with standard normal noise, drawn per image, before the head uses it (its issue 159), so that its published
MTL is ERM with noise as additional features: `embedding: noise` does the same. It adds up the domains' losses, which
are averaged here: the same for Adam except for its epsilon and weight decay. It makes one forward pass per domain, here
there is one for all: BatchNorm in train mode sees all domains together, as in the other algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.algorithms.common.domain_losses import DomainLosses
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.models.classifier import Classifier
from gsdg.types import Batch, join
from gsdg.utils.errors import UserError, check_literal, check_range

Embedding = Literal["mean", "noise"]


class MTL(DomainLosses):
    """ERM with a head that is given the mean of the features over the domain in addition to an image's own features.

    Args:
        ema: share of the new value, this minibatch's mean, in the moving average of a domain's embedding, in (0, 1].
        embedding: what the head is given: `mean`, the domain's embedding; or `noise`, standard normal, as in DomainBed.
        surgery: gradient surgery on the domains' losses, or None.
    """

    takes_loss_scaling = True
    needs = "a linear head; its predictions are batch-dependent"
    batch_dependent = True

    embeddings: Tensor  # moving averages of the mean features, [D, F], in domain order

    def __init__(self, *, ema: float, embedding: Embedding, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "(0, 1]", ema=ema)
        check_literal("algorithm.embedding", embedding, Embedding)
        self.ema, self.embedding = ema, embedding

    def setup(self, model: Classifier, domains: Sequence[str]) -> None:
        if not isinstance(model.head, nn.Linear):
            raise UserError("algorithm=mtl gives a linear head the domain's embedding. Set model.head=linear.")
        head, weight, features = model.head, model.head.weight.detach(), model.head.in_features
        model.head = nn.Linear(2 * features, head.out_features).to(weight)
        for new, old in zip(model.head.parameters(), head.parameters(), strict=True):
            new.requires_grad_(old.requires_grad)
        self.register_buffer("embeddings", weight.new_zeros(len(domains), features))
        super().setup(model, domains)

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        joint = join(batches)
        features = joint.split(self.model.featurize(joint.images))
        means = torch.stack([domain_features.mean(0) for domain_features in features])
        drawn = self.indices(batches)
        embeddings = self.ema * means + (1 - self.ema) * torch.stack([self.embeddings[d] for d in drawn])
        for d, embedding in zip(drawn, embeddings.detach(), strict=True):
            self.embeddings[d] = embedding
        logits = [self._logits(z, e) for z, e in zip(features, embeddings, strict=True)]
        labels = joint.split(joint.labels)
        return [F.cross_entropy(domain_logits, y) for domain_logits, y in zip(logits, labels, strict=True)], {}

    def predict(self, images: Tensor) -> Tensor:
        """Logits of images that are all of one domain. The logits of an image depend on the other images."""
        features = self.model.featurize(images)
        return self._logits(features, features.mean(0))

    def _logits(self, features: Tensor, embedding: Tensor) -> Tensor:
        """features [B, F], embedding [F] -> [B, classes]."""
        noise = self.embedding == "noise"
        second = torch.randn_like(features) if noise else embedding.expand_as(features)
        return self.model.head(torch.cat([features, second], 1))
