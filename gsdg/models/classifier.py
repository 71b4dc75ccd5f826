"""The model class: images -> features, with dropout -> logits.

Source: DomainBed's `networks.ResNet` and `networks.Classifier` (dropout on the features, one linear head, BatchNorm in
eval mode whose affine parameters are trained).

Deliberate deviations: the heads that are not DomainBed's (`heads.py`), and the selection of what trains
(`trainable.py`). With bf16 and fp16 the head still runs in float32: this costs nothing, and the loss needs float32
logits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gsdg.models.backbone import build_featurizer, check_features
from gsdg.models.heads import Head, make_head
from gsdg.models.lora import add_lora
from gsdg.models.trainable import TrainOnly, select_trainable
from gsdg.types import ImageSpec
from gsdg.utils.errors import UserError, listing

Precision = Literal["float32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
ATTENTION = ("attention",)


class Classifier(nn.Module):
    """A backbone, dropout and a head.

    Args:
        backbone: a function: weights -> (featurizer [B, C, H, W] -> [B, F], F); or a module with `num_features` F, or a
            class of such, see gsdg.models.backbone.
        weights: "imagenet" or "pretrained" if the backbone has such weights, null (random), or the path of a state
            dict file.
        classes: number of classes of the data set.
        head: "linear", "mlp" or "cosine", see `heads.py`; or "none": the features are the logits.
        dropout: probability of dropout on the features, in [0, 1).
        freeze_bn: whether BatchNorm keeps its running statistics and normalises by them; its affine parameters are
            trained. With `train_only`, `freeze` or `lora`, a layer whose affine parameters do not train keeps its
            statistics in any case (a layer without such parameters, if nothing in the backbone trains): what is frozen
            does not change.
        image_size: height and width of the images in pixels, >= 1.
        mean, std: for the normalisation of the images, one number per channel (1, 2 or 3 channels); std > 0.
        precision: of the featurizer: "float32", or "bf16" or "fp16" (autocast).
        train_only: "all"; "head", "attention", "norm" or "bias"; or a list of name patterns, see `trainable.py`. While
            nothing in the backbone trains, the features have no graph.
        freeze: name patterns of parameters that do not train although `train_only` selects them.
        lora: rank of the matrices that are added to linear layers and trained in place of the backbone's own weights,
            see `lora.py`; 0: none.
        lora_layers: name patterns of the weights of these layers.
    Attributes:
        holds_statistics: whether all BatchNorm layers of the backbone keep their statistics for the time being.
    Raises:
        UserError: for values outside these ranges, for fewer features than classes with `head="none"`, and for patterns
            that match nothing.
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
        train_only: TrainOnly | Sequence[str] = "all",
        freeze: Sequence[str] = (),
        lora: int = 0,
        lora_layers: Sequence[str] = ATTENTION,
    ) -> None:
        super().__init__()
        _check_choice("head", head, get_args(Head))
        _check_choice("precision", precision, get_args(Precision))
        if not 0 <= dropout < 1:
            raise UserError(f"model.dropout is a probability in [0, 1), found {dropout}")
        self.spec = image_spec(size=image_size, mean=mean, std=std)
        self.featurizer, features = build_featurizer(backbone, weights)
        self.dropout = nn.Dropout(dropout)
        self.head = make_head(head, features, classes)
        self.features = features
        self.classes = classes
        self.freeze_bn = freeze_bn
        self.precision = precision
        self.selects, self.holds_statistics = train_only != "all" or bool(freeze) or lora > 0, False
        _check_lora(lora, lora_layers, train_only)
        if lora:
            add_lora(self, lora, lora_layers)
        if self.selects:
            select_trainable(self, train_only, freeze)
        self.train()  # torch starts in train mode without calling train(): freeze BatchNorm now

    def featurize(self, images: Tensor) -> Tensor:
        """The features [B, F] of images [B, C, H, W], after dropout; float32, whatever the precision.

        Raises:
            UserError: if the featurizer's output has another shape.
        """
        with self.autocast(images.device):
            features = check_features(self.featurizer(images), self.features)
        return self.dropout(features if self.precision == "float32" else features.float())

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context in which the featurizer runs."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, dtype=AUTOCAST[self.precision])

    def forward(self, images: Tensor) -> Tensor:
        """The logits of images [B, C, H, W]: [B, classes] float32; [B, F] with `head="none"` (a label is a feature)."""
        return self.head(self.featurize(images))

    def train(self, mode: bool = True) -> Classifier:
        """Like nn.Module.train, but BatchNorm layers of the featurizer that keep their statistics stay in eval mode."""
        super().train(mode)
        for module in self.featurizer.modules():
            if isinstance(module, _BatchNorm) and self._keeps_statistics(module):
                module.eval()
        return self

    def hold_statistics(self, hold: bool) -> None:
        """Let all BatchNorm layers of the featurizer keep their statistics from now on, or no longer."""
        self.holds_statistics = hold
        self.train(self.training)

    def _keeps_statistics(self, layer: nn.Module) -> bool:
        if self.freeze_bn or self.holds_statistics:
            return True
        affine = list(layer.parameters()) or list(self.featurizer.parameters())
        return self.selects and not any(parameter.requires_grad for parameter in affine)


@contextmanager
def head_inputs(model: Classifier) -> Generator[list[Tensor]]:
    """Inside, the list gets the features [B, F] that the head is given in each forward pass, float32."""
    inputs: list[Tensor] = []
    with model.dropout.register_forward_hook(lambda *call: inputs.append(call[2].float())):
        yield inputs


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


def _check_lora(rank: int, layers: Sequence[str], train_only: object) -> None:
    if rank < 0:
        raise UserError(f"model.lora is a rank, 1 or more, or 0 for none; found {rank}")
    if not rank and tuple(layers) != ATTENTION:
        raise UserError("model.lora_layers is of no use without a rank: set model.lora=8, or leave it out")
    if rank and train_only != "all":
        raise UserError(f"model.lora={rank} trains its own matrices and the head: leave model.train_only out")
