"""One hidden layer on flat inputs: a small model for precomputed features, such as those of a frozen network.

`benchmarks/frozen_features.py` writes such features as small images. Images are flattened in the order of torch's
Flatten: channel by channel.
"""

from __future__ import annotations

from torch import nn

from gsdg.models.weights import load_weights
from gsdg.utils.errors import UserError


def mlp(weights: str | None, *, inputs: int, width: int) -> tuple[nn.Module, int]:
    """The network without a head: [B, C, H, W] -> `width` features. It has no BatchNorm.

    Args:
        weights: null (random), or the path of a state dict file.
        inputs: C H W, the numbers per image.
        width: of the hidden layer.
    """
    if min(inputs, width) < 1:
        raise UserError(f"model.backbone: found inputs={inputs} and width={width}, expected 1 or more of each.")
    featurizer = nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU())
    load_weights(featurizer, weights, imagenet=None, ignore="")
    return featurizer, width
