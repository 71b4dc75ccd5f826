"""Where in a network there are feature maps to work on: stages by name, checked with one image.

The stages of known networks end where a map has a 4th, an 8th and a 16th of the image's side; the last is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from gsdg.errors import UserError, listing

RESNET = ("layer1", "layer2", "layer3")
EFFICIENTNET = ("blocks.1", "blocks.2", "blocks.4")


def places(model: nn.Module, after: Sequence[str | int] | None) -> list[str]:
    """Names of modules of `model.featurizer` that yield feature maps: those in `after`, or its stages where it is None.

    UserError, with the names that are valid, where there are none or one yields no map.
    """
    valid = with_maps(model)
    if not valid:
        raise UserError("this algorithm works on feature maps, and the model has none: choose another model.")
    chosen = stages(model.featurizer) if after is None else [str(name) for name in after]
    wrong = [name for name in chosen if name not in valid]
    if chosen and not wrong:
        return chosen
    known = "null means the stages of a ResNet, an EfficientNet or a network with GroupNorms, and the model is none"
    found = known if after is None else f"found {listing(wrong)}, which yields no feature map in this model"
    some = listing(name for name in valid if name.count(".") < 2)  # not what is inside a block
    raise UserError(f"algorithm.after: {found}. Valid: a list of modules that do, such as {some}.")


def stages(featurizer: nn.Module) -> list[str]:
    """Of a ResNet, an EfficientNet or, failing that, a network with GroupNorm: one for each, the last left out."""
    modules = dict(featurizer.named_modules())
    for known in (RESNET, EFFICIENTNET):
        if all(name in modules for name in known):
            return list(known)
    return [name for name, module in modules.items() if isinstance(module, nn.GroupNorm)][:-1]


def with_maps(model: nn.Module) -> list[str]:
    """The featurizer's modules whose output is [B, C, H, W] of more than one place, found with one black image."""
    found: dict[str, None] = {}  # a module may be called twice

    def note(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
            found[name] = None

    named = [(name, module) for name, module in model.featurizer.named_modules() if name]
    handles = [module.register_forward_hook(partial(note, name)) for name, module in named]
    like, training, size = next(model.parameters()), model.training, model.spec.size
    try:
        with torch.no_grad():
            model.eval().featurizer(like.new_zeros(1, model.spec.channels, size, size))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return list(found)
