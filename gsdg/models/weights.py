"""Initial weights of a backbone: from torch.hub, from a local file, or random. Errors name the tensors that do not fit.

A file holds `torch.save(net.state_dict(), path)` and must fit the network exactly; only its ImageNet classifier is
ignored. No code in the file is executed. With GSDG_OFFLINE set (in jobs on compute nodes) nothing is downloaded.
"""

from __future__ import annotations

import os
import pickle
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
from torch import Tensor, nn

from gsdg.utils.digest import file_digest
from gsdg.utils.errors import UserError

State = dict[str, Tensor]
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
    return Pretrained(lambda: path, partial(read_state, path))


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
        raise UserError(_no_such_file(Path(weights).expanduser()))


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
        state = read_state(Path(weights).expanduser())
    elif imagenet is None:
        raise UserError(
            "this model has no ImageNet weights: model.weights must be null or the path of a state dict file"
        )
    else:
        state = imagenet()
    state = {key: tensor for key, tensor in state.items() if not (ignore and key.startswith(ignore))}
    if problems := _mismatches(net.state_dict(), state):
        raise UserError(f"model.weights={weights} does not fit the model:\n  " + "\n  ".join(problems))
    net.load_state_dict(state)  # strict; files from before torch 0.4.1 lack num_batches_tracked, which torch adds


def read_state(path: Path) -> State:
    """The state dict in a file written by `torch.save(net.state_dict(), path)`; no code in it is executed."""
    if not path.is_file():
        raise UserError(_no_such_file(path))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(
            f"the weights file {path} ({path.stat().st_size} bytes) can't be read as a state dict: it is truncated, "
            f"corrupt or of another type ({type(error).__name__}). Delete it and copy, download or save it again "
            "(torch.save(net.state_dict(), path))"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        content = (
            f"a dict of {', '.join(map(str, list(state)[:4]))}" if isinstance(state, dict) else type(state).__name__
        )
        raise UserError(
            f"the weights file {path} should hold a state dict (names to tensors), found {content}: "
            "save it with torch.save(net.state_dict(), path)"
        )
    return state


def _no_such_file(path: Path) -> str:
    return (
        f"model.weights={path}: no such file. Valid: imagenet (where the model has such weights), null, or the "
        "path of a state dict saved with torch.save(net.state_dict(), path)"
    )


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


def _mismatches(expected: State, state: State) -> list[str]:
    """One line per kind of mismatch, each with at most three names; empty if the keys and shapes agree."""
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    reshaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return [f"{len(names)} {kind}: {', '.join(names[:3])}{', ..' * (len(names) > 3)}" for kind, names in kinds if names]
