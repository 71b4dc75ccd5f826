"""Which modules of a network have feature maps as output, and which of them are the network's stages.

The default stages of known networks end where the feature map has a fourth, an eighth and a sixteenth of the image's
side length; the last stage is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from gsdg.models.classifier import Classifier
from gsdg.utils.errors import UserError, listing

RESNET = ("layer1", "layer2", "layer3")
EFFICIENTNET = ("blocks.1", "blocks.2", "blocks.4")


def feature_map_modules(model: Classifier, names: Sequence[str | int] | None) -> list[str]:
    """Names of modules of `model.featurizer` with feature maps as output.

    Args:
        names: the names to check and return; None: the featurizer's default stages.

    Raises:
        UserError: if the model has no feature maps, or a named module has no feature map as output; with valid names.
    """
    valid = modules_with_maps(model)
    if not valid:
        raise UserError("this algorithm changes feature maps, and the model has none: choose another model.")
    chosen = default_stages(model.featurizer) if names is None else [str(name) for name in names]
    wrong = [name for name in chosen if name not in valid]
    if chosen and not wrong:
        return chosen
    if names is None:
        problem = "null means the stages of a ResNet, an EfficientNet or a network with GroupNorms, "
        problem += "and the model is none of these"
    else:
        problem = f"found {listing(wrong)}, which has no feature map as output in this model"
    examples = listing(name for name in valid if name.count(".") < 2)  # without the modules inside blocks
    raise UserError(f"algorithm.after: {problem}. Valid: a list of modules with feature maps, such as {examples}.")


def default_stages(featurizer: nn.Module) -> list[str]:
    """Stages of a ResNet or an EfficientNet, otherwise all modules of class GroupNorm; without the last one."""
    modules = dict(featurizer.named_modules())
    for stages in (RESNET, EFFICIENTNET):
        if all(name in modules for name in stages):
            return list(stages)
    return [name for name, module in modules.items() if isinstance(module, nn.GroupNorm)][:-1]


def modules_with_maps(model: Classifier) -> list[str]:
    """The featurizer's modules with output [B, C, H, W] of more than one position, found with one black image."""
    names: dict[str, None] = {}  # in order, without duplicates: a module may be called twice

    def note(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and prod(output.shape[2:]) > 1:
            names[name] = None

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
    return list(names)
