"""Every key that a user can set, collected from the choices of every group: `algorithm.beta1 (DANN)`.

A node with a `_target_` has the keys of its YAML and of its constructor's signature; an object inside it is a node of
its own. The name in brackets is the class that the key belongs to: two classes at one place have keys of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import cache

import hydra
from config_choices import CHOICES, CONF
from hydra.utils import get_object
from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf
from omegaconf import OmegaConf

from gsdg.experiment import SUPPLIED
from gsdg.schema import accepted
from hydra_plugins.gsdg_launchers import LocalConf, SlurmConf

SEARCH = "search=domainbed"
PRESET = ("experiment",)  # a choice of other keys' values, not a key with an effect of its own


@cache
def every_key() -> dict[str, str]:
    """{key: the first choice, as an override, that has it}."""
    keys: dict[str, str] = {}
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        whole = _composed("config", SEARCH)
        for choice in CHOICES:  # each alone: faster than with all the others
            for key in _keys_below(_composed(choice.replace("=", "/"))):
                keys.setdefault(key, choice)
    for key, value in whole.items():
        if key not in (*SUPPLIED, *PRESET):
            keys |= {f"{key}.{inner}": SEARCH for inner in value} if isinstance(value, dict) else {key: ""}
    return keys


@cache
def launcher_keys() -> frozenset[str]:
    """What our launchers' YAML files set, and what they have beside submitit's own settings."""
    files = [OmegaConf.load(path) for path in (CONF / "hydra" / "launcher").glob("*.yaml")]
    ours = {field.name for kind in (SlurmConf, LocalConf) for field in fields(kind)}
    submitits = {field.name for kind in (SlurmQueueConf, LocalQueueConf) for field in fields(kind)}
    keys = {key for file in files for key in file if key != "defaults"} | (ours - submitits)
    return frozenset(f"hydra.launcher.{key}" for key in keys)


def _composed(name: str, *overrides: str) -> dict:
    return OmegaConf.to_container(hydra.compose(name, [*overrides]), resolve=False)


def _keys_below(node: dict, path: str = "") -> Iterator[str]:
    """Those of a node and of the nodes in it. The first argument of a function that is called later is the caller's."""
    if "_target_" in node:
        parameters = list(accepted(node))
        passed = {*SUPPLIED.get(path, ()), *(parameters[:1] if node.get("_partial_") else ())}
        for key in sorted({*node, *parameters} - passed):
            if not key.startswith("_"):
                yield f"{path}.{key} ({get_object(node['_target_']).__name__})"
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _keys_below(value, f"{path}.{key}".removeprefix("."))
