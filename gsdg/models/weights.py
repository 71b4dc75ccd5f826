"""Initial weights of a backbone: from torch.hub, from a local file, or random. Errors name the tensors that do not fit.

A file must fit the network exactly; only its ImageNet classifier is ignored (see weights_files.py). With GSDG_OFFLINE
set (in jobs on compute nodes) nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from hydra.utils import get_object
from torch import nn

from gsdg.models.weights_files import State, fitted, no_such_file, read_state
from gsdg.utils.digest import file_digest
from gsdg.utils.errors import UserError

PRETRAINED = ("pretrained", "imagenet")  # values of model.weights that name weights which a backbone declares


class Pretrained(NamedTuple):
    """The pretrained weights of a backbone. Both functions may raise UserError."""

    file: Callable[[], Path]  # where the weights file is, or will be; a pattern if only the download can tell
    load: Callable[[], State]  # reads the file, and downloads it first if needed


def pretrained(weights: Pretrained) -> Callable[[Any], Any]:
    """Decorator that declares the "imagenet" weights of a backbone, so that they can be found before it is built."""

    def declare(backbone: Any) -> Any:
        backbone.imagenet = weights
        return backbone

    return declare


def weights_source(model: dict) -> Pretrained | None:
    """The weights that a model's config node names; None if it names none, or if only the backbone can tell."""
    weights, backbone = model.get("weights"), model.get("backbone")
    if weights is None:
        return None
    if weights in PRETRAINED:
        return declared_weights(backbone) if isinstance(backbone, dict) else None
    path = Path(weights).expanduser()
    return Pretrained(lambda: path, partial(read_start, path))


def declared_weights(backbone: dict) -> Pretrained | None:
    """The pretrained weights that the function of a backbone's config node declares; None if it declares none.

    Declared by `pretrained`, or, if they depend on its options, by `gsdg.models.backbone.declares`.
    """
    function = get_object(backbone["_target_"])
    if hasattr(function, "weights_of"):
        return function.weights_of(**{key: value for key, value in backbone.items() if not key.startswith("_")})
    return getattr(function, "imagenet", None)


def check_weights_file(model: dict) -> None:
    """UserError if a backbone of gsdg is to start from a file that does not exist; the run id contains its content.

    The meaning of `weights` for other backbones is known to their code only.
    """
    weights, backbone = model.get("weights"), model.get("backbone")
    ours = isinstance(backbone, dict) and backbone["_target_"].startswith("gsdg.")
    if ours and weights not in (None, *PRETRAINED) and not Path(weights).expanduser().is_file():
        raise UserError(no_such_file(Path(weights).expanduser()))


def read_start(path: Path) -> State:
    """`read_state` of the file that model.weights names. UserError: also where it is missing, with what is valid."""
    if not path.is_file():
        raise UserError(no_such_file(path))
    return read_state(path)


def load_weights(net: nn.Module, weights: str | None, *, imagenet: Callable[[], State] | None, ignore: str) -> None:
    """Load weights into `net`.

    Args:
        weights: "imagenet", the path of a state dict file, or None: `net` stays random.
        imagenet: returns the state dict of "imagenet"; None if the network has no ImageNet weights.
        ignore: a prefix of keys that the state dict may have although `net` does not; "" for none. All other keys must
            match.
    Raises:
        UserError: for a file that is missing, cannot be read or does not fit.
    """
    if weights is None:
        return
    if weights != "imagenet":
        state = read_start(Path(weights).expanduser())
    elif imagenet is None:
        raise UserError(
            "this model has no ImageNet weights: model.weights must be null, a finished run or a state dict file"
        )
    else:
        state = imagenet()
    net.load_state_dict(fitted(net, state, f"model.weights={weights}", ignore=ignore))  # strict


def hub(url: str) -> Pretrained:
    """The weights at `url`, cached by torch.hub."""
    return Pretrained(partial(hub_file, url), partial(hub_state, url))


def hub_file(url: str) -> Path:
    """The path of the file from `url` in torch.hub's cache, whether it exists or not."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)


def hub_state(url: str) -> State:
    """The state dict at `url`, cached by torch.hub."""
    return read_state(hub_fetch(url))


def hub_fetch(url: str) -> Path:
    """The file from `url` in torch.hub's cache, downloaded if needed. Its name contains the hash that is checked.

    Several processes may download the same file at once: each writes a temporary file and renames it when complete.
    """
    cached = hub_file(url)
    if not os.path.isfile(cached):  # Path.is_file raises if a parent folder is not accessible
        if command := os.environ.get("GSDG_OFFLINE"):
            raise UserError(_offline(url, cached, command))
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(cached), hash_prefix=_hash_in_name(cached))
        except (OSError, HTTPException, RuntimeError) as error:  # no network, a full disk, a wrong hash
            raise UserError(
                f"the weights can't be downloaded from {url} ({error}). On a machine with internet get that "
                f"file, then put it at {cached}, or name it with model.weights=<file>; model.weights=null "
                "model.freeze_bn=false starts from random weights"
            ) from error
    check_hash(cached)
    return cached


def check_hash(cached: Path) -> None:
    """UserError if the hash of a file in torch.hub's cache differs from its name; the file is read once per process.

    torch checks the hash of its own downloads only, not of a file that was copied there or truncated later.
    """
    expected = _hash_in_name(cached)
    digest = file_digest(cached) if expected else ""
    if expected and not digest.startswith(expected[: len(digest)]):
        raise UserError(
            f"the weights file {cached} ({cached.stat().st_size:,} bytes) does not match its name: its SHA-256 begins "
            f"with {digest[: len(expected)]}, not with {expected}, so it was truncated or replaced. Remove it, and run "
            f"the same command on a machine with internet to download it again: rm {shlex.quote(str(cached))}"
        )


def _hash_in_name(cached: Path) -> str | None:
    """`f37072fd` of `resnet18-f37072fd.pth`; None if the name has no hash."""
    ending = re.search(r"-([0-9a-f]{8,})\.", cached.name)
    return ending and ending.group(1)


def _offline(url: str, cached: Path, command: str) -> str:
    """One complete line, because a status shows only the first; then what to do if `command` was run already."""
    return (
        f"the weights {url} are not at {cached}, and a compute node downloads nothing; on a login node: "
        f"{command}\nIf you have done so, the login node stored them elsewhere: set TORCH_HOME, there and in the job, "
        "to a folder that both can read, or give the file with model.weights=<file>; model.weights=null "
        "model.freeze_bn=false starts from random weights"
    )
