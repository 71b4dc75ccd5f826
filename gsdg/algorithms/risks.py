"""The domains' risks, for algorithms that weigh them: one forward of all, one mean cross-entropy each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.batch import Batch, join


def domain_risks(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """[D], with a graph: every domain counts once, however many images it has."""
    joint = join(batches)
    logits, labels = joint.split(model(joint.images)), joint.split(joint.labels)
    return torch.stack([F.cross_entropy(own, y) for own, y in zip(logits, labels, strict=True)])
