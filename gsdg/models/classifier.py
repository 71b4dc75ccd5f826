"""The model class: images -> features, with dropout -> logits.

Source: DomainBed's `networks.ResNet` and `networks.Classifier` (dropout on the features, one linear head, BatchNorm in
eval mode whose affine parameters are trained).

Deliberate deviations: `head="none"` uses the features themselves as logits, as the GradSurgery release does. With bf16
the head still runs in float32: this costs nothing, and the loss needs float32 logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gsdg.models.backbone import build_featurizer, check_features
from gsdg.types import ImageSpec
from gsdg.utils.errors import UserError, listing

Head = Literal["linear", "none"]
Precision = Literal["float32", "bf16"]


class Classifier(nn.Module):
    """A backbone, dropout and a head.

    Args:
        backbone: a function: weights -> (featurizer [B, C, H, W] -> [B, F], F); or a module with `num_features` F, or a
            class of such, see gsdg.models.backbone.
        weights: "imagenet" or "pretrained" if the backbone has such weights, null (random), or the path of a state
            dict file.
        classes: number of classes of the data set.
        head: "linear", or "none": the features are the logits.
        dropout: probability of dropout on the features, in [0, 1).
        freeze_bn: whether BatchNorm keeps its running statistics and normalises by them; its affine parameters are
            trained.
        image_size: height and width of the images in pixels, >= 1.
        mean, std: for the normalisation of the images, one number per channel (1, 2 or 3 channels); std > 0.
        precision: of the featurizer: "float32", or "bf16" (autocast).
    Raises:
        UserError: for values outside these ranges, and for fewer features than classes with `head="none"`.
    """

    def __init__(
        self,
        *,
        backbone: Callable[[str | None], tuple[nn.Module, int] | nn.Module] | nn.Module,
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
        self.featurizer, features = build_featurizer(backbone, weights)
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
        self.train()  # torch starts in train mode without calling train(): freeze BatchNorm now

    def featurize(self, images: Tensor) -> Tensor:
        """The features [B, F] of images [B, C, H, W], after dropout; float32, also with bf16.

        Raises:
            UserError: if the featurizer's output has another shape.
        """
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            features = check_features(self.featurizer(images), self.features)
        return self.dropout(features.float() if self.precision == "bf16" else features)

    def forward(self, images: Tensor) -> Tensor:
        """The logits of images [B, C, H, W]: [B, classes] float32; [B, F] with `head="none"` (a label is a feature)."""
        return self.head(self.featurize(images))

    def train(self, mode: bool = True) -> Classifier:
        """Like nn.Module.train, but frozen BatchNorm layers stay in eval mode."""
        super().train(mode)
        if self.freeze_bn:
            for module in self.featurizer.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def image_spec(*, size: int, mean: Sequence[float], std: Sequence[float]) -> ImageSpec:
    """The format of the model's input images. UserError unless mean and std have one number per channel and std > 0."""
    if size < 1:
        raise UserError(f"model.image_size is a number of pixels, 1 or more, found {size}")
    if len(mean) not in (1, 2, 3) or len(std) != len(mean):
        raise UserError(
            "model.mean and model.std need one number per channel, 1 (grey), 2 (red and green) or 3 (colour), "
            f"found {list(mean)} and {list(std)}"
        )
    if min(std) <= 0:
        raise UserError(f"model.std needs positive numbers, found {list(std)}")
    return ImageSpec(size, len(mean), tuple(mean), tuple(std))


def _check_choice(name: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise UserError(f"model {name} {value!r} is unknown; valid: {listing(valid)}")
