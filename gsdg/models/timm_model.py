"""Any architecture of timm (https://github.com/huggingface/pytorch-image-models), without its classifier.

`arch` is timm's name, with or without a tag: `vit_small_patch16_224`, `vit_base_patch14_dinov2.lvd142m`. Image size,
mean and std come from timm's `pretrained_cfg`, the number of features from the network. timm loads its weights itself,
so it converts them, adapts the first layer to the number of channels, and resamples position embeddings to the image
size. Only the file is found here, in the same cache and by the same names as timm does it: then a compute node makes no
request, and the file's content is noted in the run's folder.

Deliberate deviation: a cached file is used without asking the hub for a newer one.
"""

from __future__ import annotations

import os
import pickle
import shlex
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from gsdg.models.backbone import declares
from gsdg.models.hf_cache import HubFile
from gsdg.models.timm_backbones import import_timm
from gsdg.models.weights import Pretrained, State, hub_fetch, hub_file, load_weights
from gsdg.types import ImageSpec
from gsdg.utils.errors import UserError, listing


def timm_images(arch: str = "", **_: object) -> ImageSpec:
    """The images that the weights of `arch` expect."""
    config = pretrained_cfg(str(arch))
    channels, size, _width = config.input_size
    return ImageSpec(size, channels, tuple(config.mean), tuple(config.std))


def timm_weights(arch: str = "", **_: object) -> Pretrained:
    """timm's weights for `arch`. UserError if there are none."""
    file, fetch = _located(str(arch))
    return Pretrained(file, lambda: _read(fetch()))


@declares(weights=timm_weights, images=timm_images)
def timm_model(weights: str | None, *, arch: str, image_size: int, channels: int = 3) -> tuple[nn.Module, int]:
    """The network `arch`: [B, channels, image_size, image_size] -> features.

    Args:
        weights: "pretrained" (timm's), null (random) or the path of a state dict file with timm's names.
        arch: timm's name, with or without a tag. UserError with similar names for an unknown one.
        image_size: height and width in pixels; networks of one size only (ViT, Swin) are built for it.
        channels: of the images, the length of model.mean; timm adapts the weights of the first layer.
    """
    config = pretrained_cfg(arch)

    def built(size: int, file: Path | None = None) -> nn.Module:
        options: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
        if config.fixed_input_size:
            options["img_size"] = size
        return _built(arch, options, file)

    if weights == "pretrained":
        net = built(image_size, _located(arch)[1]())
    else:
        net = _load_file(weights, config, image_size, built)
    _check_patches(net, arch, image_size)
    width: Any = getattr(net, "head_hidden_size", net.num_features)  # of MobileNetV3 1280, where num_features is 960
    return net, width


def _load_file(weights: str | None, config: Any, image_size: int, built: Callable[[int], Any]) -> nn.Module:
    """The network with the weights of a file, which may be for images of the size of the pretraining.

    built: the network for an image size. timm then resamples position embeddings, as it does for its own files.
    """
    net, size, ignore = built(image_size), config.input_size[1], _prefix(config.classifier)
    try:
        load_weights(net, weights, imagenet=None, ignore=ignore)
        return net
    except UserError as error:
        if not config.fixed_input_size or size == image_size or not hasattr(net, "set_input_size"):
            raise
        net = built(size)
        try:
            load_weights(net, weights, imagenet=None, ignore=ignore)
        except UserError:
            raise error from None
        net.set_input_size((image_size, image_size))
        return net


def _prefix(classifier: str | Sequence[str] | None) -> str:
    """With what the names of the classifier's tensors begin: `head.`, or `head` for `head` and `head_dist`; or ""."""
    names = [classifier] if isinstance(classifier, str) else classifier or []
    return os.path.commonprefix([f"{name}." for name in names])


def _built(arch: str, options: dict, file: Path | None) -> nn.Module:
    """timm's network with these options. UserError if timm refuses them, or cannot load the weights file."""
    from safetensors import SafetensorError

    source = {"pretrained_cfg_overlay": {"file": str(file), "custom_load": False}} if file else {}
    errors = (AssertionError, ArithmeticError, RuntimeError, ValueError, KeyError, OSError, EOFError)
    try:
        return import_timm().create_model(arch, pretrained=file is not None, **options, **source)
    except (*errors, pickle.UnpicklingError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        if not file:
            given = listing(f"{key}={value}" for key, value in options.items())
            raise UserError(f"timm can't build model.arch={arch} with {given} ({reason})") from error
        real = file.resolve()  # the cache of the hub has a link to it
        raise UserError(
            f"timm can't load the weights file {file} ({real.stat().st_size:,} bytes) into model.arch={arch} "
            f"({reason}). If it was truncated, remove it, and run the same command on a machine with internet to "
            f"download it again: rm {shlex.quote(str(real))}"
        ) from error


def _check_patches(net: nn.Module, arch: str, image_size: int) -> None:
    """UserError if the network cuts images into patches that do not fill them, which fails at the first image."""
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    if isinstance(patch, tuple) and image_size % patch[0]:
        near = max(1, round(image_size / patch[0])) * patch[0]
        raise UserError(
            f"model.image_size={image_size} is not a multiple of the patches of model.arch={arch}, {patch[0]} pixels. "
            f"Set model.image_size={near}."
        )


# ---- what timm knows about an architecture --------------------------------------------------------------------------


@cache
def pretrained_cfg(arch: str) -> Any:
    """timm's PretrainedCfg of an architecture. UserError with similar names if there is no such one."""
    timm = import_timm()
    name, _, tag = arch.partition(".")
    if name not in (names := timm.list_models()):
        near = get_close_matches(name, names, n=5, cutoff=0.5)
        guess = f" Near names: {listing(near)}." if near else ""
        raise UserError(
            f"model.arch={arch}: timm {timm.__version__} has no architecture {name}.{guess}\n"
            "All names: python -c 'import timm; print(*timm.list_models(), sep=chr(10))'"
        )
    tagged = timm.list_models(f"{name}.*", include_tags=True)
    if tag and arch not in tagged:
        raise UserError(
            f"model.arch={arch}: timm {timm.__version__} has no weights {tag} for {name}. Valid: "
            f"{listing([name, *tagged])}."
        )
    return timm.models.get_pretrained_cfg(arch)


def _located(arch: str) -> tuple[Callable[[], Path], Callable[[], Path]]:
    """Where the weights file of `arch` is or will be, and how it is fetched. UserError if it has no weights."""
    config = pretrained_cfg(arch)
    if config.hf_hub_id:
        repo, _, revision = config.hf_hub_id.partition("@")
        source = HubFile(repo, file_names(config.hf_hub_filename), revision or None)
        return source.file, source.fetch
    if config.url:
        return partial(hub_file, config.url), partial(hub_fetch, config.url)
    name = arch.partition(".")[0]
    other = import_timm().list_models(f"{name}*", pretrained=True)
    raise UserError(
        f"model.weights=pretrained: timm has no weights for model.arch={arch}. Choose an architecture that has weights "
        f"(similar ones: {listing(other[:5])}), model.weights=<file>, or random initialization: "
        "model.weights=null model.freeze_bn=false."
    )


def file_names(chosen: str | None) -> tuple[str, ...]:
    """The names under which timm looks for a file on the hub, in order. chosen: `hf_hub_filename` of its config."""
    name = chosen or "pytorch_model.bin"
    safe = {"pytorch_model.bin": "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
    if not name.endswith(".bin"):
        return (name,)
    return safe.get(name, name.removesuffix(".bin") + ".safetensors"), name


def _read(file: Path) -> State:
    return import_timm().models.load_state_dict(str(file))
