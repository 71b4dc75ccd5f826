"""MTL, marginal transfer learning (Blanchard et al., JMLR 2021, arXiv:1711.07910): the head sees the domain's mean too.

    L_d = mean_b CE(h(z_b, e_d), y_b)      e_d <- ema mean_b z_b + (1 - ema) e_d,  a gradient flows through the mean

The head is linear in the F features z_b of an image and the F numbers e_d, the mean embedding of its domain. To
predict, e is the mean over the images given at once: `trainer.eval_batch_size` and the order of the images thus matter:
they are evaluated shuffled.

Deviations: the paper is about kernel machines; this is DomainBed's form for networks. DomainBed fills the embedding
with standard normal noise, a draw an image, before the head reads it (its issue 159), so that its published MTL is ERM
with noise beside the features: `embedding: noise` does so. It adds the domains' losses up, here they are averaged: the
same for Adam but for its epsilon and weight decay. It runs one forward a domain, here one for all: BatchNorm that
trains sees the domains together, as in the other algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.algorithms.domain_losses import DomainLosses
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.batch import Batch, join
from gsdg.errors import UserError, check_literal, check_range

Embedding = Literal["mean", "noise"]


class MTL(DomainLosses):
    """ema: the share of this minibatch in its domain's embedding; 1: all of it. embedding: what the head reads."""

    needs = "a linear head; sees the images of a domain together"
    sees_together = True

    embeddings: Tensor  # [D, F], in the order of `domains`

    def __init__(self, *, ema: float, embedding: Embedding, surgery: GradSurgery | None = None) -> None:
        super().__init__(surgery=surgery)
        check_range("algorithm", "(0, 1]", ema=ema)
        check_literal("algorithm.embedding", embedding, Embedding)
        self.ema, self.embedding = ema, embedding

    def setup(self, model: nn.Module, domains: Sequence[str]) -> None:
        if not isinstance(model.head, nn.Linear):
            raise UserError("algorithm=mtl gives a linear head the domain's embedding. Set model.head=linear.")
        weight, features = model.head.weight.detach(), model.head.in_features
        model.head = nn.Linear(2 * features, model.head.out_features).to(weight)
        self.register_buffer("embeddings", weight.new_zeros(len(domains), features))
        super().setup(model, domains)

    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        joint = join(batches)
        features = joint.split(self.model.featurize(joint.images))
        means = torch.stack([own.mean(0) for own in features])
        embeddings = self.ema * means + (1 - self.ema) * self.embeddings
        self.embeddings.copy_(embeddings.detach())
        logits = [self._logits(own, embedding) for own, embedding in zip(features, embeddings, strict=True)]
        return [F.cross_entropy(own, y) for own, y in zip(logits, joint.split(joint.labels), strict=True)], {}

    def predict(self, images: Tensor) -> Tensor:
        """The images of one domain -> logits; what an image gets depends on those beside it."""
        features = self.model.featurize(images)
        return self._logits(features, features.mean(0))

    def _logits(self, features: Tensor, embedding: Tensor) -> Tensor:
        """features [B, F], embedding [F] -> [B, classes]."""
        noise = self.embedding == "noise"
        beside = torch.randn_like(features) if noise else embedding.expand_as(features)
        return self.model.head(torch.cat([features, beside], 1))
