"""Checks of a whole config: keys that nothing reads, labels that are the name of another choice, useless BatchNorm.

A key that nothing reads would still change the run id, and tables would show equal runs as different methods.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from gsdg.config.choices import choices, groups, shipped_node, slash_hint
from gsdg.config.command_line import NEEDED
from gsdg.config.identity import short_target
from gsdg.config.names import how_to_give_text
from gsdg.config.schema import build
from gsdg.utils.errors import UserError, listing, nearest

GROUPS = ("dataset", "split", "model", "algorithm", "optimizer", "trainer", "search", "logger", "callbacks")
VALUES = {
    "seed": int,
    "deterministic": bool,
    "device": str,
    "data_dir": str,
    "runs_dir": str,
    "force": bool,
    "on_code_change": str,
}


def check_keys(config: dict) -> None:
    """UserError for an unknown key at the top level, or a value of another type."""
    valid = [*GROUPS, *VALUES]
    for key in config:
        if key not in valid:
            guess = nearest(key, {valid_key: config.get(valid_key) for valid_key in valid})
            raise UserError(f"unknown key {key}.{guess} Valid at the top level: {listing(sorted(valid))}.")
    for key, kind in VALUES.items():
        if type(config.get(key)) is not kind:
            quotes = how_to_give_text(key, config.get(key)) if kind is str else ""
            raise UserError(f"{key}: found {config.get(key)!r}, expected {kind.__name__}.{quotes}")


def check_groups(config: Mapping) -> None:
    """UserError for a missing group, and for `trainer.averaging=swad`, which must be written with a slash."""
    for group in NEEDED:
        if not isinstance(config.get(group), Mapping):
            valid = listing(f"{group}={name}" for name in sorted(choices(group)))
            raise UserError(f"{group}: found {config.get(group)!r}, but a run needs one. Choose: {valid}.")
    for outer, _, inner in (group.partition("/") for group in groups()):
        value = config[outer].get(inner) if outer in NEEDED else None
        if isinstance(value, str) and (message := slash_hint(f"{outer}.{inner}", value)):
            raise UserError(message)


def check_preset(config: Mapping) -> None:
    """UserError for a preset without `# @package _global_`: nothing reads its keys, which are below `experiment`."""
    if isinstance(config.get("experiment"), Mapping):
        raise UserError(
            f"experiment: found the keys {listing(config['experiment'])} in it, which nothing reads.\n"
            "The first line of a preset's file must be `# @package _global_`."
        )


# ---- labels -------------------------------------------------------------------------------------------------------


def check_labels(config: dict) -> None:
    """UserError for a `name` that is the name of another choice of its group: tables would show the run under it."""
    for where, node in named_nodes(config):
        name, group = node["name"], where.replace("algorithm.surgery.", "algorithm.").replace(".", "/")
        if not isinstance(name, str):
            raise UserError(f"{where}.name: found {name!r}, expected str.")
        found = defining_values(node)
        expected = defining_values(shipped_node(group, name)) if name in choices(group) else {}
        if group == "model" and not expected and found.get("_target_") == "Classifier":
            expected = named_network(name, found.get("arch", ""))
        if wrong := [key for key in expected if key in found and not matches(found[key], expected[key])]:
            other = f"; to run {name} itself: {group}={name}" if name in choices(group) else ""
            raise UserError(
                f"{where}.name={name}: that is the name of another {group}, with {describe(expected, wrong)}; "
                f"this one has {describe(found, wrong)}.\n"
                f"Leave the name as its file has it, or choose one that nothing else has{other}."
            )


def named_nodes(node: dict, where: str = "") -> Iterator[tuple[str, dict]]:
    """(dotted key, node) for every node of a config that has a `name`; inner nodes before the nodes that hold them."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from named_nodes(value, f"{where}.{key}" if where else key)
    if where and "name" in node:
        yield where, node


def defining_values(node: dict) -> dict:
    """The values of a node that its name stands for: its classes, its rule, its image folders; not its settings."""
    node = node.get("partition", node) if "_target_" not in node else node
    rule = node.get("rule") if node.get("name") != "grad_surgery" else None  # grad_surgery may have any rule
    nodes = {"_target_": node, "backbone": node.get("backbone"), "rule": rule}
    values: dict[str, Any] = {
        key: short_target(inner["_target_"])
        for key, inner in nodes.items()
        if isinstance(inner, dict) and "_target_" in inner
    }
    values["conditional"] = node.get("conditional")
    values["arch"] = node.get("arch") or (node["backbone"].get("arch") if "backbone" in values else None)
    if values.get("_target_") == "ImageFolders":  # other data sets generate their domains, of any angle or colour
        values["domains"] = node.get("domains")
    return {key: value for key, value in values.items() if value is not None}


def matches(value: Any, expected: Any) -> bool:
    """Whether the values are equal; a list of domains may also be a subset of the expected one."""
    return set(value) <= set(expected) if isinstance(expected, list) else value == expected


def describe(values: dict, keys: list[str]) -> str:
    chosen = {key: values[key] for key in keys}
    return listing(f"{key} {listing(value) if isinstance(value, list) else value}" for key, value in chosen.items())


def named_network(name: str, arch: str) -> dict:
    """What a label stands for that names a network of timm or torchvision, such as `timm/resnet34`; {} for another.

    arch: of the model, if it has one; its tag, which names weights, need not be in the label.
    """
    library, _, network = name.rpartition("/")
    if library in ("timm", "torchvision"):
        return {"backbone": f"{library}_model", "arch": network}
    if name not in networks() or name == arch.partition(".")[0]:
        return {}
    return {"arch": name} if arch else {"backbone": name}


@cache
def networks() -> set[str]:
    """The names of torchvision's networks: a label with such a name says which network the model is."""
    from torchvision.models import list_models

    return set(list_models())


# ---- BatchNorm ----------------------------------------------------------------------------------------------------


def check_frozen_statistics(model: dict) -> None:
    """UserError if BatchNorm is frozen in a network with random weights: it would keep mean 0 and variance 1."""
    if model.get("weights") is None and model.get("freeze_bn") and has_batchnorm(json.dumps(model)):
        raise UserError(
            "model.freeze_bn=true with model.weights=null: BatchNorm would keep its initial statistics, mean 0 and "
            "variance 1, which are not those of random weights. Such a network hardly learns.\n"
            "Let BatchNorm train: model.freeze_bn=false. Or start from trained weights: model.weights=<file>, or "
            "imagenet where the model has such."
        )


@cache
def has_batchnorm(model: str) -> bool:
    """Whether a model has a BatchNorm layer. model: its node as JSON. The model is built; the RNG state is restored."""
    with torch.random.fork_rng(devices=[]):
        return any(isinstance(module, _BatchNorm) for module in build(json.loads(model), classes=1).modules())
