"""The networks, random batches and numerics of the parts `step` and `memory`."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpu_parts.measurement import Setting, Skipped
from gsdg.models import Classifier, convnet, resnet18, resnet50, timm_model
from gsdg.types import Batch

DOMAINS, IMAGES, CLASSES = 3, 32, 7  # images per domain
VIT = "vit_b16"
BACKBONES: dict[str, Callable] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    VIT: partial(timm_model, arch="vit_base_patch16_224", image_size=224),
    "convnet": partial(convnet, channels=3),
}


class Numerics(NamedTuple):
    """tf32: whether products and convolutions of float32 use TF32. autocast: dtype of the featurizer, None: float32."""

    tf32: bool = False
    autocast: torch.dtype | None = None


PRECISIONS = {
    "float32": Numerics(),
    "tf32": Numerics(tf32=True),
    "bf16": Numerics(autocast=torch.bfloat16),
    "fp16": Numerics(autocast=torch.float16),
}


class Network(nn.Module):
    """Images [B, 3, H, W] -> logits [B, CLASSES] float32, with autocast of the featurizer only.

    The Classifier's own `forward` would switch the autocast off.
    """

    def __init__(self, classifier: Classifier, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.featurizer, self.head, self.autocast = classifier.featurizer, classifier.head, autocast

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            features = self.featurizer(images)
        return self.head(features.float())


def model_names(setting: Setting) -> list[str]:
    return ["convnet"] if setting.tiny else ["resnet18", "resnet50", VIT]


def network(name: str, precision: str, setting: Setting, *, channels_last: bool = False) -> Network:
    """The network on the device, in train mode, with the same random weights at every call."""
    if name == VIT and not find_spec("timm"):
        raise Skipped("timm is not installed")
    torch.manual_seed(0)
    options = {"head": "linear", "dropout": 0.0, "freeze_bn": True, "mean": [0.5] * 3, "std": [0.5] * 3}
    backbone = BACKBONES[name]
    classifier = Classifier(backbone=backbone, weights=None, classes=CLASSES, image_size=_size(setting), **options)
    model = Network(classifier, PRECISIONS[precision].autocast)
    return model.to(device=setting.device, memory_format=_layout(channels_last))


def random_batches(setting: Setting, *, channels_last: bool = False) -> list[Batch]:
    """One batch of random images and labels per domain."""
    count, size, layout = 2 if setting.tiny else IMAGES, _size(setting), _layout(channels_last)
    pairs = [(torch.randn(count, 3, size, size), torch.randint(CLASSES, (count,))) for _ in range(DOMAINS)]
    return [
        Batch(images.to(setting.device, memory_format=layout), labels.to(setting.device), f"domain {d}")
        for d, (images, labels) in enumerate(pairs)
    ]


def _size(setting: Setting) -> int:
    return 28 if setting.tiny else 224


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


@contextmanager
def numerics(precision: str, *, trial: bool = True) -> Generator[None]:
    """Inside, float32 products and convolutions use TF32 or not, as the precision says.

    trial: whether cuDNN chooses its algorithms by trial (cudnn.benchmark).
    """
    cudnn, products = torch.backends.cudnn, torch.get_float32_matmul_precision()
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, cudnn.benchmark = PRECISIONS[precision].tf32, trial
    torch.set_float32_matmul_precision("high" if PRECISIONS[precision].tf32 else "highest")
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before
        torch.set_float32_matmul_precision(products)
