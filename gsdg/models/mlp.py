"""One hidden layer on flat inputs: a small head for features that were computed once, such as a frozen network's.

`benchmarks/frozen_features.py` writes such features as small images. Flattened channel by channel, as torch does.
"""

from __future__ import annotations

from torch import nn

from gsdg.errors import UserError
from gsdg.models.weights import load_weights


def mlp(weights: str | None, *, inputs: int, width: int) -> tuple[nn.Module, int]:
    """`width` features from [B, C, H, W] with C H W = `inputs`; weights: null or a state dict file. No BatchNorm."""
    if min(inputs, width) < 1:
        raise UserError(f"model.backbone: found inputs={inputs} and width={width}, expected 1 or more of each.")
    featurizer = nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU())
    load_weights(featurizer, weights, imagenet=None, ignore="")
    return featurizer, width
