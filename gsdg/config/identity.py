"""Which runs are the same run: the identity of a config, whose hash is the run id. Standard library and Hydra only.

The identity is the resolved config, without what cannot change a result:
- the keys of NOT_SCIENTIFIC: folders, device, logging, loading, how torch's optimizers are implemented;
- a value that is its constructor's default. So a key that is added later, with a default that means what the code did
  before, changes no id; and an explicit `betas: [0.9, 0.999]` is what Adam does anyway. A constructor's default may
  therefore not be changed without a new VERSION (tests/golden/defaults.json holds them);
- dataset.short_side where images are not stored (trainer.transform=exact); a search at its draw 0, the plain config.
A `_target_` in gsdg counts by its last word, whatever file it is in; a file of weights by its content, wherever it
lies; the root of a data set by its last word: the images themselves are compared when a run starts (reuse.py).
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
from functools import lru_cache
from pathlib import Path

VERSION = 2  # of this definition: it is part of every id
# What may differ between two executions of the same experiment.
NOT_SCIENTIFIC = (
    "data_dir",
    "runs_dir",
    "device",
    "force",
    "resubmit",
    "on_code_change",
    "dataset.cache",
    "optimizer.foreach",
    "optimizer.fused",
    "trainer.checkpoint_every",
    "trainer.log_every",
    "trainer.workers",
    "trainer.keep_weights",
    "algorithm.diagnostics",
    "algorithm.surgery.diagnostics",
)


def run_id(config: dict) -> str:
    """Twelve hex digits: the same experiment has the same folder everywhere. config: resolved and checked."""
    return hashed(identity(config))


def hashed(identity: dict) -> str:
    text = json.dumps([VERSION, identity], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def identity(config: dict) -> dict:
    """What of a resolved config can change a result. UserError where a `_target_` cannot be imported."""
    return _by_name(_without_defaults(scientific(config)))


def scientific(config: dict) -> dict:
    """A copy of the config without NOT_SCIENTIFIC and what has no effect beside the other values; without places."""
    config = _without_places(copy.deepcopy(config))
    for key in NOT_SCIENTIFIC:
        _remove(config, key)
    if config.get("trainer", {}).get("transform") == "exact":
        _remove(config, "dataset.short_side")
    if (config.get("search") or {}).get("hparams_seed") == 0:
        del config["search"]
    return config


def _without_places(config: dict) -> dict:
    """The config with data and weights known by what they are, not by where they lie; changes and returns `config`."""
    dataset, model = config.get("dataset", {}), config.get("model", {})
    if isinstance(dataset.get("root"), str):
        dataset["root"] = _last_word(Path(config.get("data_dir") or ".", Path(dataset["root"]).expanduser()))
    if isinstance(weights := model.get("weights"), str) and (path := Path(weights).expanduser()).is_file():
        model["weights"] = f"sha256 {file_digest(path)}"
    return config


def _last_word(path: Path) -> str:
    return os.path.basename(os.path.normpath(path.expanduser().absolute()))


def edited(identity: dict, config: dict) -> list[str]:
    """The dotted keys whose value in a run's config.json is not the one in its identity.json: edited by hand.

    Weights are not compared: they may not be here.
    """
    now = _leaves(_by_name(scientific(config)))
    return [key for key, value in _leaves(identity).items() if now.get(key) != value and key != "model.weights"]


def file_digest(path: Path) -> str:
    """Sixteen hex digits of a file's content; read once for each path, size and time of change."""
    stat = Path(path).stat()
    return _file_digest(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1000)
def _file_digest(path: str, size: int, changed: int) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()[:16]


def _remove(config: dict, key: str) -> None:
    *parents, leaf = key.split(".")
    node: object = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(leaf, None)


def _without_defaults(node: object) -> object:
    """The node, and those in it, without the values that are their constructor's defaults."""
    if not isinstance(node, dict):
        return node
    defaults = _defaults(node["_target_"]) if "_target_" in node else {}
    return {
        key: _without_defaults(value)
        for key, value in node.items()
        if key not in defaults or _plain(defaults[key]) != _plain(value)
    }


def _defaults(target: str) -> dict[str, object]:
    """{argument: its default} of what a `_target_` names."""
    from gsdg.schema import accepted  # Hydra, and the target's own imports

    parameters = accepted({"_target_": target})
    return {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _plain(value: object) -> object:
    """As JSON has it: a tuple is a list. What JSON has not equals itself only."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return value


def _by_name(node: object) -> object:
    """The node with `gsdg.any.file.Name` as `Name`."""
    if isinstance(node, list):
        return [_by_name(value) for value in node]
    if not isinstance(node, dict):
        return node
    named = {key: _by_name(value) for key, value in node.items()}
    if str(named.get("_target_", "")).startswith("gsdg."):
        named["_target_"] = named["_target_"].rpartition(".")[2]
    return named


def _leaves(node: dict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in node.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
