"""Weights for a backbone: from torch.hub, from a local file, or none. What does not fit is refused by name.

A file holds `torch.save(net.state_dict(), path)`, and must fit the network exactly: only the ImageNet classifier in it
is ignored. Nothing in it is executed. Where GSDG_OFFLINE is set (a job's compute node) nothing is ever downloaded.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from hydra.utils import get_object
from torch import Tensor, nn

from gsdg.errors import UserError

State = dict[str, Tensor]


class Pretrained(NamedTuple):
    """A backbone's ImageNet weights: the file they lie in once they are here; what fetches, if need be, and reads it.

    Both may raise UserError.
    """

    file: Callable[[], Path]
    load: Callable[[], State]


def pretrained(weights: Pretrained) -> Callable[[Any], Any]:
    """Note on a backbone what its weights "imagenet" are, so that they can be looked for before it is built."""

    def noted(backbone: Any) -> Any:
        backbone.imagenet = weights
        return backbone

    return noted


def weights_source(model: dict) -> Pretrained | None:
    """Where a model's config node says its weights are read from; None: from nowhere, or only the backbone knows."""
    weights, backbone = model.get("weights"), model.get("backbone")
    if weights is None:
        return None
    if weights == "imagenet":
        return getattr(get_object(backbone["_target_"]), "imagenet", None) if isinstance(backbone, dict) else None
    path = Path(weights).expanduser()
    return Pretrained(lambda: path, partial(read_state, path))


def check_weights_file(model: dict) -> None:
    """UserError where one of gsdg's backbones is to start from a file that is not there: its content is part of a run's
    identity. What another's `weights` mean, only its code knows."""
    weights, backbone = model.get("weights"), model.get("backbone")
    ours = isinstance(backbone, dict) and backbone["_target_"].startswith("gsdg.")
    if ours and weights not in (None, "imagenet") and not Path(weights).expanduser().is_file():
        raise UserError(_no_such_file(Path(weights).expanduser()))


def load_weights(net: nn.Module, weights: str | None, *, imagenet: Callable[[], State] | None, ignore: str) -> None:
    """Fill `net` from "imagenet" or from a state dict file; null leaves it random. Keys that begin with `ignore` may
    be there or not; all others must match. Raises UserError for a file that is missing, unreadable or does not fit."""
    if weights is None:
        return
    if weights == "imagenet" and imagenet is None:
        raise UserError("this model has no ImageNet weights: model.weights wants null or the path of a state dict file")
    state = imagenet() if weights == "imagenet" else read_state(Path(weights).expanduser())
    kept = {key: tensor for key, tensor in state.items() if not (ignore and key.startswith(ignore))}
    if problems := _misfits(net.state_dict(), kept):
        raise UserError(f"model.weights={weights} does not fit the model:\n  " + "\n  ".join(problems))
    net.load_state_dict(kept)  # strict; only files older than torch 0.4.1 lack num_batches_tracked, and torch adds it


def read_state(path: Path) -> State:
    """The state dict in a file written by `torch.save(net.state_dict(), path)`; nothing in it is executed."""
    if not path.is_file():
        raise UserError(_no_such_file(path))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(
            f"the weights file {path} ({path.stat().st_size} bytes) can't be read as a state dict: it is truncated, "
            f"corrupt or of another kind ({type(error).__name__}). Delete it and copy, download or save it again "
            "(torch.save(net.state_dict(), path))"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"a dict of {', '.join(map(str, list(state)[:4]))}" if isinstance(state, dict) else type(state).__name__
        raise UserError(
            f"the weights file {path} should hold a state dict (names to tensors), found {found}: "
            "save it with torch.save(net.state_dict(), path)"
        )
    return state


def _no_such_file(path: Path) -> str:
    return (
        f"model.weights={path}: no such file. Valid: imagenet (where the model has such weights), null, or the "
        "path of a state dict saved with torch.save(net.state_dict(), path)"
    )


def hub(url: str) -> Pretrained:
    """The state dict at `url`, kept in torch.hub's cache."""
    return Pretrained(partial(hub_file, url), partial(hub_state, url))


def hub_file(url: str) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)


def hub_state(url: str) -> State:
    """The state dict at `url`, kept in torch.hub's cache; its name carries the hash that is checked.

    Processes may fetch one file at once: each writes a file of its own, and renames it when it is whole.
    """
    cached = hub_file(url)
    if not os.path.isfile(cached):  # Path's own raises where a folder of it may not be looked into
        if command := os.environ.get("GSDG_OFFLINE"):
            raise UserError(_offline(url, cached, command))
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(cached), hash_prefix=cached.stem.rsplit("-", 1)[1])
        except (OSError, HTTPException, RuntimeError) as error:  # no network, a full disk, a wrong hash
            raise UserError(
                f"the ImageNet weights can't be downloaded from {url} ({error}). On a machine with internet get that "
                f"file, then put it at {cached}, or name it with model.weights=<file>; model.weights=null "
                "model.freeze_bn=false starts from random weights"
            ) from error
    return read_state(cached)


def _offline(url: str, cached: Path, command: str) -> str:
    """One line that tells it all, since a status shows no more; then what to do if that was done."""
    return (
        f"the ImageNet weights {url} are not at {cached}, and a compute node downloads nothing; on a login node: "
        f"{command}\nIf that was done, they are elsewhere there: set TORCH_HOME, there and in the job, to a folder "
        "that both see, or name the file with model.weights=<file>; model.weights=null model.freeze_bn=false starts "
        "from random weights"
    )


def _misfits(wanted: State, found: State) -> list[str]:
    """One line a kind of misfit, each with at most three names; empty when the keys and shapes agree."""
    missing = [key for key in wanted if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in wanted]
    reshaped = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in found and found[key].shape != tensor.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return [f"{len(names)} {kind}: {', '.join(names[:3])}{', ..' * (len(names) > 3)}" for kind, names in kinds if names]
