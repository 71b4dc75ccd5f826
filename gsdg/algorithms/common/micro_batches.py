"""The cross-entropy of a batch in pieces, so that a large network needs the memory of one piece only.

    1/N sum_i CE(f(x_i), y_i)  =  sum over pieces P of  1/N sum_(i in P) CE(f(x_i), y_i)

The gradients of the terms add up to that of the whole batch, to rounding, if no layer depends on the other images:
BatchNorm in train mode normalises each piece by its own statistics, and dropout draws other masks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn


def cross_entropy_terms(model: nn.Module, images: Tensor, labels: Tensor, size: int | None) -> Iterator[Tensor]:
    """The terms of the mean cross-entropy, 0-dim, each with a graph of its own, made when it is asked for.

    Args:
        model: images [B, C, H, W] -> logits [B, classes].
        images, labels: N of each.
        size: images per piece; None: all in one.
    """
    if size is None:
        yield F.cross_entropy(model(images), labels)
        return
    for piece, its_labels in zip(images.split(size), labels.split(size), strict=True):
        yield F.cross_entropy(model(piece), its_labels, reduction="sum") / len(labels)
