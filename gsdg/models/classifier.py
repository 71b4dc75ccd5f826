"""The one model class: images -> features (dropout on them) -> logits.

Source: DomainBed's `networks.ResNet` and `networks.Classifier` (dropout on the features, one linear head, BatchNorm
that stays in eval mode while its affine part trains).

Deliberate deviations: `head="none"` uses the features themselves as logits, which is what the GradSurgery release
computes; under bf16 the head still runs in float32, since it costs nothing and the loss wants float32 logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gsdg.batch import ImageSpec
from gsdg.errors import UserError, listing

Head = Literal["linear", "none"]
Precision = Literal["float32", "bf16"]


class Classifier(nn.Module):
    """A backbone and a head. `backbone(weights)` returns a featurizer [B, C, H, W] -> [B, F], and F.

    weights: "imagenet" where the backbone has such, null (random), or the path of a state dict file.
    image_size, mean, std: what the images are resized to and normalised by; one mean a channel.
    freeze_bn: BatchNorm keeps its statistics while its affine part trains. dropout: on the features.
    Raises UserError for dropout outside [0, 1), an unknown head or precision, a normalisation that does not fit, and
    classes that have no feature each under `head="none"`.
    """

    def __init__(
        self,
        *,
        backbone: Callable[[str | None], tuple[nn.Module, int]],
        weights: str | None,
        classes: int,
        head: Head,
        dropout: float,
        freeze_bn: bool,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        _check_choice("head", head, get_args(Head))
        _check_choice("precision", precision, get_args(Precision))
        if not 0 <= dropout < 1:
            raise UserError(f"model.dropout is a probability in [0, 1), found {dropout}")
        self.spec = image_spec(size=image_size, mean=mean, std=std)
        self.featurizer, features = backbone(weights)
        if head == "none" and classes > features:
            raise UserError(
                f"model.head=none uses the {features} features as logits, but the data set has {classes} classes: "
                "use model.head=linear or a wider model"
            )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(features, classes) if head == "linear" else nn.Identity()
        self.features = features
        self.classes = classes
        self.freeze_bn = freeze_bn
        self.precision = precision
        self.train()  # torch starts in training mode without a call to train(): freeze at once

    def featurize(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, F], after dropout; float32 under bf16 too."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            features = self.featurizer(images)
        return self.dropout(features.float() if self.precision == "bf16" else features)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits float32: [B, classes], or [B, F] under `head="none"` (a label indexes a feature)."""
        return self.head(self.featurize(images))

    def train(self, mode: bool = True) -> Classifier:
        """As torch's, but frozen BatchNorms keep their running statistics and use them."""
        super().train(mode)
        if self.freeze_bn:
            for module in self.featurizer.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def image_spec(*, size: int, mean: Sequence[float], std: Sequence[float]) -> ImageSpec:
    """What the model is fed, checked: one mean and one positive standard deviation a channel."""
    if size < 1:
        raise UserError(f"model.image_size is a number of pixels, 1 or more, found {size}")
    if len(mean) not in (1, 2, 3) or len(std) != len(mean):
        raise UserError(
            "model.mean and model.std want a number a channel, 1 (grey), 2 (red and green) or 3 (colour), "
            f"found {list(mean)} and {list(std)}"
        )
    if min(std) <= 0:
        raise UserError(f"model.std wants positive numbers, found {list(std)}")
    return ImageSpec(size, len(mean), tuple(mean), tuple(std))


def _check_choice(name: str, found: str, valid: Sequence[str]) -> None:
    if found not in valid:
        raise UserError(f"model {name} {found!r} is unknown; valid: {listing(valid)}")
