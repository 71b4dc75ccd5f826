"""What a backbone is, what it may declare before it is built, and what it has to return.

A backbone is a function `f(weights, **options) -> (featurizer [B, C, H, W] -> [B, F], F)`, or gives any `nn.Module`
whose `num_features` is F: a class with `_partial_: true`, which is called with the weights, or a module that Hydra
builds without `_partial_`. A function may declare its pretrained weights and the images that they expect, see
`declares`; the config's nulls are then filled in before anything is built, so that the run id contains the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydra.utils import get_object
from torch import Tensor, nn

from gsdg.config.schema import import_target, parameters_of
from gsdg.models.weights import PRETRAINED, Pretrained, declared_weights, load_weights
from gsdg.types import ImageSpec
from gsdg.utils.errors import UserError, listing

EXPECTED = "a backbone is a function f(weights) -> (module, number of features), or an nn.Module with num_features"


def declares(*, weights: Callable[..., Pretrained], images: Callable[..., ImageSpec]) -> Callable[[Any], Any]:
    """Decorator that declares what a backbone function needs, as functions of its options (all but `weights`).

    Args:
        weights: gives its pretrained weights, `model.weights=pretrained`. UserError if there are none.
        images: gives the images that these weights expect. UserError if the options are wrong.
    """

    def declare(backbone: Any) -> Any:
        backbone.weights_of, backbone.images_of = weights, images
        return backbone

    return declare


# ---- before it is built ---------------------------------------------------------------------------------------------


def with_declared_images(model: dict) -> dict:
    """The model's config node with numbers in place of nulls in image_size, mean and std.

    An option `image_size` of a backbone that declares its images is filled in like the model's; it and an option
    `channels` must fit the model's images.

    Raises:
        UserError: for a null that the backbone declares nothing for, and for options that do not fit.
    """
    nulls = [key for key in ("image_size", "mean", "std") if model.get(key, 0) is None]
    backbone = model.get("backbone")
    declared = declared_images(backbone) if isinstance(backbone, dict) else None
    if isinstance(backbone, dict) and declared is not None:
        filled = _filled(model, backbone, nulls, declared)
        _check_options(filled, nulls)
        return filled
    if nulls:
        raise UserError(
            f"model.{nulls[0]}=null: this model's backbone does not declare the images that it expects. Set "
            f"{listing(f'model.{key}' for key in nulls)}."
        )
    return model


def _filled(model: dict, backbone: dict, nulls: list[str], declared: ImageSpec) -> dict:
    values = {"image_size": declared.size, "mean": list(declared.mean), "std": list(declared.std)}
    filled = model | {key: values[key] for key in nulls}
    if backbone.get("image_size", 0) is None:
        filled["backbone"] = backbone | {"image_size": filled["image_size"]}
    return filled


def declared_images(backbone: dict) -> ImageSpec | None:
    """The images that the function of a backbone's node declares; None if it declares none."""
    images_of = getattr(import_target(backbone.get("_target_"), "model.backbone"), "images_of", None)
    return images_of and images_of(**{key: value for key, value in backbone.items() if not key.startswith("_")})


def _check_options(model: dict, filled: list[str]) -> None:
    """UserError if the backbone is to be built for images of another size or number of channels than the model's."""
    backbone, parameters = model["backbone"], parameters_of(model["backbone"])
    size = backbone.get("image_size", model["image_size"])
    if size != model["image_size"]:
        raise UserError(
            f"model.backbone.image_size={size} is not model.image_size={model['image_size']}: leave it out."
        )
    if "channels" not in parameters or not isinstance(model["mean"], list):
        return
    channels = backbone.get("channels", parameters["channels"].default)
    if channels != len(model["mean"]):
        whose = "that the weights expect, " if "mean" in filled else ""
        raise UserError(
            f"model.backbone.channels={channels}, but model.mean has {len(model['mean'])} numbers, {whose}"
            f"{model['mean']}: set model.mean and model.std to one number per channel, or model.backbone.channels to "
            f"{len(model['mean'])}."
        )


def canonical_weights(model: dict) -> str | None:
    """The model's `weights` as the run id has them: `imagenet` for `pretrained` where a backbone calls them that.

    UserError for pretrained weights that the backbone does not have, or by another name.
    """
    weights, backbone = model["weights"], model["backbone"]
    if weights not in PRETRAINED or not isinstance(backbone, dict):
        return weights
    function = get_object(backbone["_target_"])
    if hasattr(function, "imagenet"):
        return "imagenet"
    if hasattr(function, "weights_of"):
        declared_weights(backbone)
        if weights == "imagenet":
            raise UserError(
                "model.weights=imagenet: this model's weights are called pretrained, because not all were trained on "
                "ImageNet. Write model.weights=pretrained."
            )
    elif not backbone.get("_partial_") or backbone["_target_"].startswith("gsdg."):
        raise UserError(f"model.weights={weights}: this model has no pretrained weights. {_VALID}.")
    return weights  # the meaning of this word is known to the user's function


_VALID = (
    "Valid: null (random initialization), or the path of a state dict saved with torch.save(net.state_dict(), path)"
)


# ---- built ----------------------------------------------------------------------------------------------------------


def build_featurizer(backbone: object, weights: str | None) -> tuple[nn.Module, int]:
    """The featurizer and its number of features.

    Args:
        backbone: a function or class, which is called with the weights, or a module, into which a file is loaded.
    Raises:
        UserError: if the result is not a module, or its number of features is not known.
    """
    if isinstance(backbone, nn.Module):
        load_weights(backbone, weights, imagenet=None, ignore="")
        return backbone, _num_features(backbone)
    if not callable(backbone):
        raise UserError(
            f"model.backbone: found {_described(backbone)}; {EXPECTED}. A function or class that the model is to call "
            "with the weights needs `_partial_: true` beside its `_target_`."
        )
    result = backbone(weights)
    if isinstance(result, nn.Module):
        return result, _num_features(result)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], nn.Module):
        raise UserError(f"model.backbone returned {_described(result)}; {EXPECTED}.")
    return result[0], _checked(result[1], "the number of features that model.backbone returned")


def _num_features(module: nn.Module) -> int:
    name = type(module).__name__
    if not hasattr(module, "num_features"):
        raise UserError(f"model.backbone: the module {name} has no num_features; {EXPECTED}.")
    return _checked(module.num_features, f"num_features of the module {name}")


def _checked(features: object, what: str) -> int:
    if isinstance(features, int) and not isinstance(features, bool) and features > 0:
        return features
    raise UserError(f"model.backbone: {what} is {features!r}; valid: an integer, 1 or more.")


def _described(value: object) -> str:
    """`a tuple of Linear, str`, or `NoneType`."""
    kinds = listing(type(item).__name__ for item in value) if isinstance(value, tuple) else ""
    return f"a tuple of {kinds}" if kinds else f"{type(value).__name__}"


def check_features(features: object, expected: int) -> Tensor:
    """The featurizer's output; UserError unless it is [B, expected]. The host knows shapes without synchronizing."""
    if isinstance(features, Tensor) and features.ndim == 2 and features.shape[1] == expected:
        return features
    found = f"the shape {list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
    raise UserError(
        f"the model's backbone should return features [B, {expected}], one vector per image, found {found}. "
        "Average over positions or tokens in it, and return the number of features that it has."
    )
