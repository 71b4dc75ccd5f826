"""The domain risks: the mean cross-entropy of each domain's minibatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.types import Batch, Joint, join


def risks_from_logits(logits: Tensor, joint: Joint) -> list[Tensor]:
    """The risk of each domain, 0-dim, in domain order, from the logits [N, classes] of the joint images."""
    pairs = zip(joint.split(logits), joint.split(joint.labels), strict=True)
    return [F.cross_entropy(domain_logits, labels) for domain_logits, labels in pairs]


def domain_risks(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """The risks [D] of all domains, with a graph, from one joint forward pass.

    Their mean gives each domain the same weight, however many images it has.
    """
    joint = join(batches)
    return torch.stack(risks_from_logits(model(joint.images), joint))
