"""What is refused of a whole config: keys that nothing reads, and labels that are the name of something else.

A key that nothing reads would still change a run's id, and a table would show equal runs as different methods.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch
import yaml
from torch.nn.modules.batchnorm import _BatchNorm

import gsdg
from gsdg.errors import UserError, listing, nearest
from gsdg.schema import build

GROUPS = ("dataset", "split", "model", "algorithm", "optimizer", "trainer", "search")
VALUES = {
    "seed": int,
    "deterministic": bool,
    "device": str,
    "data_dir": str,
    "runs_dir": str,
    "force": bool,
    "on_code_change": str,
}
# The YAML files: beside the package in a checkout, in it when installed, and in neither in the frozen copy of a sweep,
# whose configs were checked when it was submitted.
PACKAGE = Path(gsdg.__file__).parent
CONF = next(
    (folder for folder in (PACKAGE.parent / "conf", PACKAGE / "conf") if (folder / "config.yaml").is_file()), None
)


def check_keys(config: dict) -> None:
    """UserError for a top-level key that is none of a run's, or a value of another type."""
    valid = [*GROUPS, *VALUES]
    for key in config:
        if key not in valid:
            guess = nearest(key, {known: config.get(known) for known in valid})
            raise UserError(f"unknown key {key}.{guess} Valid at the top level: {listing(sorted(valid))}.")
    for key, kind in VALUES.items():
        if type(config[key]) is not kind:
            raise UserError(f"{key}: found {config[key]!r}, expected {kind.__name__}.")


def check_preset(config: Mapping) -> None:
    """UserError for a preset whose keys have all become keys of `experiment`, which nothing reads."""
    if isinstance(config.get("experiment"), Mapping):
        raise UserError(
            f"experiment: found the keys {listing(config['experiment'])} in it, which nothing reads.\n"
            "The first line of a preset's file must be `# @package _global_`."
        )


# ---- labels -------------------------------------------------------------------------------------------------------


def check_labels(config: dict) -> None:
    """UserError for a `name` that is the name of another choice of its group: tables would call the run by it."""
    for where, node in labelled(config):
        name, group = node["name"], where.replace("algorithm.surgery.", "algorithm.").replace(".", "/")
        if not isinstance(name, str):
            raise UserError(f"{where}.name: found {name!r}, expected str.")
        made_of = kind(node)
        expected = kind(shipped(group, name)) if name in choices(group) else {}
        if group == "model" and not expected and made_of.get("_target_") == "Classifier" and name in networks():
            expected = {"backbone": name}
        if wrong := [part for part in expected if part in made_of and not fits(made_of[part], expected[part])]:
            other = f"; to run {name} itself: {group}={name}" if name in choices(group) else ""
            raise UserError(
                f"{where}.name={name}: that is the name of another {group}, with {described(expected, wrong)}; "
                f"this one has {described(made_of, wrong)}.\n"
                f"Leave the name as its file has it, or choose one that nothing else has{other}."
            )


def labelled(node: dict, where: str = "") -> Iterator[tuple[str, dict]]:
    """(dotted key, node) of every node in a config that has a name, after those in it."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from labelled(value, f"{where}.{key}" if where else key)
    if where and "name" in node:
        yield where, node


def kind(node: dict) -> dict:
    """What makes a choice what its name says: its classes, its rule, its folders of images; not its settings."""
    node = node.get("partition", node) if "_target_" not in node else node
    rule = node.get("rule") if node.get("name") != "grad_surgery" else None  # the class of every rule
    classes = {"_target_": node, "backbone": node.get("backbone"), "rule": rule}
    found = {
        part: last_word(own["_target_"]) for part, own in classes.items() if isinstance(own, dict) and "_target_" in own
    }
    found["conditional"] = node.get("conditional")
    if found.get("_target_") == "ImageFolders":  # the domains of other data sets are made, of any angle or colour
        found["domains"] = node.get("domains")
    return {part: value for part, value in found.items() if value is not None}


def last_word(target: str) -> str:
    """A class of ours by its own name, wherever its file lies; anybody else's in full."""
    return target.rpartition(".")[2] if target.startswith("gsdg.") else target


def fits(found: object, expected: object) -> bool:
    """Equal; of domains, fewer of them too."""
    return set(found) <= set(expected) if isinstance(expected, list) else found == expected


def described(made_of: dict, parts: list[str]) -> str:
    values = {part: made_of[part] for part in parts}
    return listing(f"{part} {listing(value) if isinstance(value, list) else value}" for part, value in values.items())


def choices(group: str) -> set[str]:
    return files_in(CONF / group) if CONF else set()


@cache
def files_in(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.yaml")}


@cache
def shipped(group: str, name: str) -> dict:
    """A choice's YAML as it stands, over those of its group that it starts from, with its rule."""
    node = yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))
    for entry in reversed(node.pop("defaults", [])):
        if isinstance(entry, str) and entry != "_self_":
            node = shipped(group, entry) | node
        elif isinstance(entry, dict) and (rules := [entry[key] for key in entry if key.endswith("rule")]):
            node["rule"] = shipped("algorithm/rule", rules[0])
    return node


@cache
def networks() -> set[str]:
    """The networks of torchvision: a label that is one of these names says which network it is."""
    from torchvision.models import list_models

    return set(list_models())


# ---- BatchNorm ----------------------------------------------------------------------------------------------------


def check_frozen_statistics(model: dict) -> None:
    """UserError where BatchNorm would keep the statistics that it starts with, 0 and 1, on random weights."""
    if model.get("weights") is None and model.get("freeze_bn") and has_batchnorm(json.dumps(model)):
        raise UserError(
            "model.freeze_bn=true with model.weights=null: BatchNorm would keep its initial statistics, mean 0 and "
            "variance 1, which are not those of random weights. Such a network hardly learns.\n"
            "Let BatchNorm train: model.freeze_bn=false. Or start from trained weights: model.weights=<file>, or "
            "imagenet where the model has such."
        )


@cache
def has_batchnorm(model: str) -> bool:
    """Of a model's node, as JSON. It is built, and the state of the random number generator restored."""
    with torch.random.fork_rng(devices=[]):
        return any(isinstance(module, _BatchNorm) for module in build(json.loads(model), classes=1).modules())
