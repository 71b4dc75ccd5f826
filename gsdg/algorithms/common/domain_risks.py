"""The domains' risks: the mean cross-entropy of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.batch import Batch, Joint, join


def risks(logits: Tensor, joint: Joint) -> list[Tensor]:
    """logits [N, classes] of the joint images -> one 0-dim risk a domain, in order."""
    pairs = zip(joint.split(logits), joint.split(joint.labels), strict=True)
    return [F.cross_entropy(own, labels) for own, labels in pairs]


def domain_risks(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """[D], with a graph, by one forward of all: every domain counts once, however many images it has."""
    joint = join(batches)
    return torch.stack(risks(model(joint.images), joint))
