"""Every key that a user can set, collected from the choices of every group: `algorithm.beta1 (DANN)`.

A node with a `_target_` has the keys of its YAML and of its constructor's signature; an object inside it is a node of
its own. The name in brackets is the class that the key belongs to: two classes at one place have keys of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import cache

import hydra
from config_choices import CHOICES, CONF, LOGGERS, NOT_IMPORTABLE
from hydra.utils import get_object
from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf
from omegaconf import OmegaConf

from gsdg.config.schema import parameters_of
from gsdg.plan import SUPPLIED
from hydra_plugins.gsdg_launchers import LocalConf, SlurmConf

SEARCH = "search=domainbed"
PRESET = ("experiment",)  # it sets other keys and has no effect of its own


@cache
def every_key() -> dict[str, str]:
    """{key: the first choice, as an override, that has it}."""
    keys: dict[str, str] = {}
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        whole = _composed("config", SEARCH)
        for choice in [
            choice for choice in [*CHOICES, *LOGGERS] if choice not in NOT_IMPORTABLE
        ]:  # each alone, which is faster than all combinations
            for key in _keys_below(_composed(choice.replace("=", "/"))):
                keys.setdefault(key, choice)
    for key, value in whole.items():
        if key not in (*SUPPLIED, *PRESET):
            keys |= {f"{key}.{inner}": SEARCH for inner in value} if isinstance(value, dict) else {key: ""}
    return keys


@cache
def launcher_keys() -> frozenset[str]:
    """The keys that the YAML files of GSDG's launchers set, and those that GSDG adds to submitit's settings."""
    files = [OmegaConf.load(path) for path in (CONF / "hydra" / "launcher").glob("*.yaml")]
    ours = {field.name for kind in (SlurmConf, LocalConf) for field in fields(kind)}
    submitits = {field.name for kind in (SlurmQueueConf, LocalQueueConf) for field in fields(kind)}
    keys = {key for file in files for key in file if key != "defaults"} | (ours - submitits)
    return frozenset(f"hydra.launcher.{key}" for key in keys)


def _composed(name: str, *overrides: str) -> dict:
    return OmegaConf.to_container(hydra.compose(name, [*overrides]), resolve=False)


def _keys_below(node: dict, path: str = "") -> Iterator[str]:
    """The keys of a node and of the nodes inside it, without the first argument of a `_partial_` function."""
    if "_target_" in node:
        parameters = list(parameters_of(node))
        passed = {*SUPPLIED.get(path, ()), *(parameters[:1] if node.get("_partial_") else ())}
        for key in sorted({*node, *parameters} - passed):
            if not key.startswith("_"):
                yield f"{path}.{key} ({get_object(node['_target_']).__name__})"
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _keys_below(value, f"{path}.{key}".removeprefix("."))
