"""Files of weights that torch.save or safetensors wrote, of this code or of other code, as a start for a network.

A network's tensors are found in a file under any prefix: `featurizer.` (a run's own weights), `module.`
(DataParallel), `featurizer.network.` (DomainBed). No code in a file is executed.
"""

from __future__ import annotations

import json
import logging
import pickle
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gsdg.utils.errors import UserError, listing

log = logging.getLogger(__name__)
State = dict[str, Tensor]
SAVE = "torch.save(net.state_dict(), path)"
NOT_STORED = "num_batches_tracked"  # files from before torch 0.4.1 lack this counter of BatchNorm; torch adds it


def read_state(path: Path) -> State:
    """The tensors by name in a file of torch.save or safetensors: a state dict, or a dict with one state dict in it.

    No code in the file is executed. UserError if the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"the weights file {path} is missing: it was moved or removed, or its name is misspelt")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    state = content if _is_state(content) else _only_state_in(content)
    if state is None:
        kind = f"a dict of {listing(list(content)[:4])}" if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"the weights file {path} should hold a state dict (names to tensors), found {kind}: save it with {SAVE}"
        )
    return state


def _is_state(content: object) -> bool:
    return isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())


def _only_state_in(content: object) -> State | None:
    """The one state dict among the values of a training checkpoint, such as timm's or DomainBed's."""
    states = [value for value in content.values() if value and _is_state(value)] if isinstance(content, dict) else []
    return states[0] if len(states) == 1 else None


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make torch raise almost anything: IndexError, struct.error, ...
        if isinstance(error, pickle.UnpicklingError) and _names_code(str(error), path):
            raise UserError(_holds_code(path)) from error
        raise _unreadable(path, error) from error


def _names_code(message: str, path: Path) -> bool:
    """Whether torch refused a pickle for an object in it, from its message, and not because it is no pickle at all."""
    if "GLOBAL" in message:
        return True
    with path.open("rb") as file:
        return "Unsupported operand" in message and file.read(1) == pickle.PROTO  # another protocol than torch's


def _read_safetensors(path: Path) -> State:
    try:
        import safetensors
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"reading {path} needs the package safetensors: pip install 'gsdg[backbones]'") from error
    try:
        return load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"the weights file {path} ({path.stat().st_size} bytes) can't be read as a state dict: it is truncated, "
        f"corrupt or of another type ({type(error).__name__}). Delete it and copy, download or save it again ({SAVE})"
    )


def _holds_code(path: Path) -> str:
    load = f'torch.load({json.dumps(str(path))}, weights_only=False)["model_dict"]'
    code = f'import torch; torch.save({load}, "weights.pt")'
    return (
        f"the weights file {path} holds Python objects, not only tensors and plain values. Reading them could run any "
        f"code, so it is refused.\nIf you trust the file, save its state dict: python -c {shlex.quote(code)}\n"
        '(model_dict is DomainBed\'s name for it; of a whole network, take .state_dict() in place of ["model_dict"].)'
    )


def no_such_file(path: Path) -> str:
    found = "this folder is not that of a run" if path.is_dir() else "no such file"
    return (
        f"model.weights={path}: {found}. Valid: pretrained or imagenet (where the model has such weights), null, "
        f"a finished run (runs/<id>), or the path of a state dict saved with {SAVE}"
    )


# ---- fitting a file to a network -----------------------------------------------------------------------------------


def fitted(net: nn.Module, state: State, source: str, *, ignore: str) -> State:
    """The tensors of `state` for `net`, under its names. Tensors outside of the prefix are left out, and logged.

    Args:
        source: what the state comes from, for messages.
        ignore: a prefix of names, below the file's prefix, that `net` need not have: its classifier; "" for none.

    Raises:
        UserError: a tensor is missing, has another shape, or has a name that `net` does not have.
    """
    expected = net.state_dict()
    prefix = prefix_in(state, expected)
    inside = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    inside = {key: tensor for key, tensor in inside.items() if not (ignore and key.startswith(ignore))}
    if problems := _mismatches(expected, inside):
        raise UserError(f"{source} does not fit the model:\n  " + "\n  ".join(problems))
    if prefix and (others := [key for key in state if not key.startswith(prefix)]):
        log.info("%s: read the tensors %s*, left out %d others (%s)", source, prefix, len(others), _few(others))
    return inside


def prefix_in(state: State, expected: State) -> str:
    """The shortest prefix under which `state` has every expected name; "" if there is none.

    Of prefixes of equal length, such as MoCo's `encoder_q.` and `encoder_k.`, the first in the file.
    """
    names = [key for key in expected if not key.endswith(NOT_STORED)]
    candidates = [key.removesuffix(names[0]) for key in state if key.endswith(names[0])] if names else []
    fitting = [prefix for prefix in candidates if all(prefix + name in state for name in names)]
    return min(fitting, key=len, default="")


def _mismatches(expected: State, state: State) -> list[str]:
    """One line per kind of mismatch, each with at most three names; empty if the keys and shapes agree."""
    missing = [key for key in expected if key not in state and not key.endswith(NOT_STORED)]
    unexpected = [key for key in state if key not in expected]
    reshaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return [f"{len(names)} {kind}: {_few(names)}" for kind, names in kinds if names]


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', ..' * (len(names) > 3)}"


# ---- the head ------------------------------------------------------------------------------------------------------


def load_head(head: nn.Module, weights: str | None, before: Sequence[str] | None, classes: Sequence[str]) -> None:
    """Keep the head of a run's weights if the run had the same classes; else the new head stays, which is logged.

    Args:
        head: of the new model; changed in place.
        weights: model.weights, a file or anything else.
        before: the classes that the weights were trained on; None if nothing says.
        classes: of the data set that is trained on.
    """
    if weights is None or not (path := Path(weights).expanduser()).is_file() or not list(head.parameters()):
        return
    inside = {k.removeprefix("head."): tensor for k, tensor in read_state(path).items() if k.startswith("head.")}
    if not inside:
        log.info("%s has no head: the model gets a new one", path)
    elif before is None:
        log.info("%s: nothing says which classes its head has, so the model gets a new one", path)
    elif list(before) != list(classes):
        log.info(
            "%s was trained on other classes, or in another order (%s): the model gets a new head",
            path,
            _few(list(before)),
        )
    elif _mismatches(head.state_dict(), inside):
        log.info("%s has another kind of head: the model gets a new one", path)
    else:
        head.load_state_dict(inside)
        log.info("%s: its head is kept, because the classes are the same", path)
