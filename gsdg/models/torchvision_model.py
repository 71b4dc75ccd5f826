"""Any classification network of torchvision whose classifier is one linear layer, without that layer.

"pretrained" means torchvision's IMAGENET1K_V1, the weights of the papers' recipes, as for `resnet18` and `resnet50`;
the default weights where there is no IMAGENET1K_V1. torchvision loads the file itself, because it renames the tensors
of some old files.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, TypeGuard

from torch import nn
from torchvision import models

from gsdg.models.backbone import declares
from gsdg.models.weights import Pretrained, hub, hub_fetch, load_weights
from gsdg.types import ImageSpec
from gsdg.utils.errors import UserError, listing

CLASSES = 1000  # of ImageNet: the outputs of the classifier
ALL_NAMES = "All names: python -c 'from torchvision import models; print(*models.list_models(models), sep=chr(10))'"
ONE_SIZE = ("vit_", "maxvit_")  # networks that torchvision builds for one image size


def torchvision_images(arch: str = "", **_: object) -> ImageSpec:
    """The images that the weights of `arch` expect."""
    images = _weights(arch).transforms()
    return ImageSpec(images.crop_size[0], len(images.mean), tuple(images.mean), tuple(images.std))


def torchvision_weights(arch: str = "", **_: object) -> Pretrained:
    """torchvision's weights for `arch`, in torch.hub's cache."""
    return hub(_weights(arch).url)


@declares(weights=torchvision_weights, images=torchvision_images)
def torchvision_model(weights: str | None, *, arch: str, image_size: int) -> tuple[nn.Module, int]:
    """The network `arch`: [B, 3, H, W] -> features.

    Args:
        weights: "pretrained", null (random) or the path of a state dict file with torchvision's names.
        arch: torchvision's name. UserError for an unknown one, and for one without a single linear classifier.
        image_size: height and width in pixels.
    """
    declared, size = _weights(arch), torchvision_images(arch).size
    if arch.startswith(ONE_SIZE) and image_size != size:
        raise UserError(
            f"model.arch={arch} of torchvision takes images of {size} pixels only, found model.image_size={image_size}."
            " timm has such networks for other sizes: model=timm model.arch=vit_base_patch16_224."
        )
    if weights == "pretrained":
        hub_fetch(declared.url)  # torchvision finds it there, and downloads nothing
    net = models.get_model(arch, weights=declared if weights == "pretrained" else None)
    classifiers = {name: module.in_features for name, module in net.named_modules() if _classifies(module)}
    if len(classifiers) != 1:
        raise UserError(
            f"model.arch={arch}: this network of torchvision has {len(classifiers)} linear layers with {CLASSES} "
            "outputs, and only one such layer, its classifier, can be removed. Choose another, such as "
            "model.arch=resnet34, or take it from timm: model=timm."
        )
    ((name, features),) = classifiers.items()
    net.set_submodule(name, nn.Identity())
    if weights != "pretrained":
        load_weights(net, weights, imagenet=None, ignore=f"{name}.")
    return net, features


def _classifies(module: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(module, nn.Linear) and module.out_features == CLASSES


def _weights(arch: str) -> Any:
    """The weights of an architecture that "pretrained" means. UserError with similar names if there is no such one."""
    names = models.list_models(module=models)
    if arch not in names:
        near = get_close_matches(str(arch), names, n=5, cutoff=0.5)
        guess = f" Near names: {listing(near)}." if near else ""
        raise UserError(f"model.arch={arch}: torchvision has no such network.{guess}\n{ALL_NAMES}")
    weights: Any = models.get_model_weights(arch)
    return getattr(weights, "IMAGENET1K_V1", weights.DEFAULT)
