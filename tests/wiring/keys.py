"""Every key that a user can set, collected from the choices of every group: `algorithm.beta1 (DANN)`.

A node with a `_target_` has the keys of its YAML and of its constructor's signature; an object inside it is a node of
its own. The name in brackets is the class that the key belongs to: two classes at one place have keys of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import hydra
from config_choices import CHOICES, CONF, NEEDED
from hydra.utils import get_object
from omegaconf import OmegaConf

from gsdg.experiment import SUPPLIED
from gsdg.schema import accepted

SEARCH = "search=domainbed"
LAUNCHERS = ("hydra/launcher=slurm", "hydra/launcher=slurm_cpu", "hydra/launcher=local")
PRESET = ("experiment",)  # a choice of other keys' values, not a key with an effect of its own


@cache
def every_key() -> frozenset[str]:
    keys: set[str] = set()
    for choice in (*CHOICES, SEARCH):
        config = _composed(choice, *NEEDED.get(choice, []))
        for key, value in config.items():
            if key not in SUPPLIED and key not in PRESET:
                keys |= {f"{key}.{inner}" for inner in value} if isinstance(value, dict) else {key}
        for group, supplied in SUPPLIED.items():
            keys |= set(_keys_of(config[group], group, supplied))
    return frozenset(keys)


@cache
def launcher_keys() -> frozenset[str]:
    """What our launchers' YAML files set, and what they have beside submitit's own settings."""
    files = [OmegaConf.load(CONF / "hydra" / "launcher" / f"{name.split('=')[1]}.yaml") for name in LAUNCHERS]
    return frozenset(f"hydra.launcher.{key}" for file in files for key in file if key != "defaults")


def _composed(*overrides: str) -> dict:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("config", [*overrides]), resolve=False)


def _keys_of(node: dict, path: str, supplied: tuple[str, ...] = ()) -> Iterator[str]:
    """Those of a node and of the nodes in it. The first argument of a function that is called later is the caller's."""
    parameters = list(accepted(node))
    ours = {*supplied, *(parameters[:1] if node.get("_partial_") else ())}
    for key in sorted({*node, *parameters} - ours):
        if not key.startswith("_"):
            yield f"{path}.{key} ({get_object(node['_target_']).__name__})"
    for key, value in node.items():
        if isinstance(value, dict) and "_target_" in value:
            yield from _keys_of(value, f"{path}.{key}")
