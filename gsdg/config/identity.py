"""The identity of a run: the part of its config that can change a result. Its hash is the run id.

Imports only the standard library and Hydra. The identity is the resolved config without:
- the keys of NOT_SCIENTIFIC: folders, device, logging, data loading, the implementation of torch's optimizers;
- values that equal the default of their constructor. So a key that is added later, with a default that does what the
  code did before, changes no run id, and an explicit `betas: [0.9, 0.999]` for Adam does not either. Therefore the
  default of a constructor must not change without a new VERSION (tests/golden/defaults.json holds all defaults);
- dataset.short_side where images are not stored (trainer.transform=exact), and a search at draw 0, the plain config.

A `_target_` in gsdg counts by the name of the class, without its module; a file of weights by its content, without its
path; the root of a data set by the name of its folder, a list of images by its name and that of its folder. The images
and labels themselves are compared when a run starts (reuse.py).
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
from pathlib import Path
from typing import Any

from gsdg.utils.digest import file_digest

VERSION = 2  # of this definition; part of every run id
# Keys that may differ between two executions of the same experiment.
NOT_SCIENTIFIC = (
    "data_dir",
    "runs_dir",
    "device",
    "force",
    "resubmit",
    "logger",
    "callbacks",
    "on_code_change",
    "dataset.cache",
    "optimizer.foreach",
    "optimizer.fused",
    "trainer.checkpoint_every",
    "trainer.log_every",
    "trainer.workers",
    "trainer.compile",
    "trainer.keep",
    "trainer.keep_state",
    "trainer.metrics",
    "algorithm.diagnostics",
    "algorithm.surgery.diagnostics",
)


def run_id(config: dict) -> str:
    """Twelve hex digits, equal on every machine. config: resolved and checked."""
    return hash_identity(identity(config))


def hash_identity(identity: dict) -> str:
    """The run id of an identity."""
    text = json.dumps([VERSION, identity], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def identity(config: dict) -> dict:
    """The part of a resolved config that can change a result. UserError if a `_target_` cannot be imported."""
    return _without_modules(_without_defaults(scientific(config)))


def scientific(config: dict) -> dict:
    """A copy of the config without the keys that cannot change a result, and without paths; it still has defaults."""
    config = _without_paths(copy.deepcopy(config))
    for key in NOT_SCIENTIFIC:
        _remove(config, key)
    if config.get("trainer", {}).get("transform") == "exact":
        _remove(config, "dataset.short_side")
    if (config.get("search") or {}).get("hparams_seed") == 0:
        del config["search"]
    return config


def _without_paths(config: dict) -> dict:
    """Replace the path of the data by its last folder or, for a list, its last folder and name; that of weights by a
    digest. Changes and returns `config`."""
    dataset, model = config.get("dataset", {}), config.get("model", {})
    if isinstance(dataset.get("root"), str):
        dataset["root"] = _last_folder(Path(config.get("data_dir") or ".", Path(dataset["root"]).expanduser()))
    if short_target(str(dataset.get("_target_"))) == "ImageList" and isinstance(dataset.get("file"), str):
        path = Path(config.get("data_dir") or ".", Path(dataset["file"]).expanduser())
        dataset["file"] = f"{_last_folder(path.parent)}/{path.name}"
    if isinstance(weights := model.get("weights"), str) and (path := Path(weights).expanduser()).is_file():
        model["weights"] = f"sha256 {file_digest(path)}"
    return config


def _last_folder(path: Path) -> str:
    return os.path.basename(os.path.normpath(path.expanduser().absolute()))


def edited_keys(identity: dict, config: dict) -> list[str]:
    """The dotted keys with other values in a run's config.json than in its identity.json, because of a manual edit.

    model.weights is not compared, because this machine may not have the file.
    """
    values = _leaves(_without_modules(scientific(config)))
    return [key for key, value in _leaves(identity).items() if values.get(key) != value and key != "model.weights"]


def _remove(config: dict, key: str) -> None:
    *parents, leaf = key.split(".")
    node: object = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(leaf, None)


def _without_defaults(node: Any) -> Any:
    """The node, and the nodes inside it, without values that equal the default of their constructor."""
    if not isinstance(node, dict):
        return node
    defaults = _defaults(node["_target_"]) if "_target_" in node else {}
    return {
        key: _without_defaults(value)
        for key, value in node.items()
        if key not in defaults or _plain(defaults[key]) != _plain(value)
    }


def _defaults(target: str) -> dict[str, object]:
    """{argument: its default} of the class or function that a `_target_` names."""
    from gsdg.config.schema import parameters_of  # here: it imports Hydra, and whatever the target imports

    parameters = parameters_of({"_target_": target})
    return {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _plain(value: object) -> object:
    """The value as JSON represents it, so that a tuple equals a list; a value that JSON cannot represent as it is."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return value


def _without_modules(node: Any) -> Any:
    """The node with `Name` for every `gsdg.any.module.Name`."""
    if isinstance(node, list):
        return [_without_modules(value) for value in node]
    if not isinstance(node, dict):
        return node
    renamed = {key: _without_modules(value) for key, value in node.items()}
    if isinstance(renamed.get("_target_"), str):
        renamed["_target_"] = short_target(renamed["_target_"])
    return renamed


def short_target(target: str) -> str:
    """The name of a GSDG class without its module, which may be moved; any other class with its module."""
    return target.rpartition(".")[2] if target.startswith("gsdg.") else target


def _leaves(node: dict, prefix: str = "") -> dict[str, object]:
    """{dotted key: value} of every value that is not a node."""
    leaves: dict[str, object] = {}
    for key, value in node.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves
