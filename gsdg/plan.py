"""Config -> checked plan: what can be wrong without reading an image is refused here, before a run exists."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd
from omegaconf import DictConfig, OmegaConf

from gsdg.algorithms import Algorithm
from gsdg.callbacks import Callback
from gsdg.config.checks import check_frozen_statistics, check_groups, check_keys, check_labels, check_preset
from gsdg.config.hparam_search import apply, merge_ranges
from gsdg.config.identity import hash_identity, identity
from gsdg.config.places import with_absolute_places
from gsdg.config.schema import as_dict, build, check, coerce
from gsdg.data import DataSource
from gsdg.data.source import check_recorded_domains, data_source, pop_recorded_domains
from gsdg.data.split import OfficialSplit, Split
from gsdg.fits import (
    EVERYTHING_TRAINS,
    check_channels,
    check_held_out,
    check_official_split,
    check_sources,
    check_stored_size,
    check_unlabelled,
    check_updates,
    refuse_surgery,
    selects_parameters,
    try_optimizer,
    try_setup,
)
from gsdg.loggers import Logger
from gsdg.models.backbone import canonical_weights, with_declared_images
from gsdg.models.weights import check_weights_file
from gsdg.optimizer_groups import NOTHING, pop_refinements
from gsdg.runs import reuse
from gsdg.runs.weights_index import find_weights, is_run
from gsdg.runtime import named_device
from gsdg.trainer import Trainer
from gsdg.utils.errors import UserError
from gsdg.utils.seeding import seed_hash

WATCHING = {"logger": Logger, "callbacks": Callback}  # groups of which several may be chosen, and their base classes
# {group: {argument that the program passes to its constructor: where the value comes from}}.
SUPPLIED: dict[str, dict[str, str]] = {
    "trainer": {},  # first: other groups refer to its values
    "dataset": {"data_dir": "taken from data_dir, a key of its own beside dataset"},
    "split": {},
    "model": {"classes": "taken from the data set", "precision": "taken from trainer.precision"},
    "algorithm": {},
    "optimizer": {"params": "taken from the algorithm"},
}


@dataclass(frozen=True)
class Plan:
    """A run that has been checked: its resolved config, and the objects that can be built without data."""

    config: dict
    source: DataSource
    split: Split | OfficialSplit
    algorithm: Algorithm
    trainer: Trainer
    callbacks: Mapping[str, Callback] = field(default_factory=dict)

    @cached_property
    def identity(self) -> dict:
        return identity(self.config)

    @property
    def run_id(self) -> str:
        return hash_identity(self.identity)

    @property
    def seed(self) -> int:
        """Seeds initialization, batches, augmentation and dropout, all of which differ between trials."""
        return seed_hash(self.config["seed"], self.config["split"]["trial_seed"])


def prepare(raw: DictConfig | dict, build: Callable[..., Any] = build) -> Plan:
    """Check the whole config and build what needs no data.

    `prepare(plan.config)` gives an equal plan: a sweep freezes that config, and its tasks prepare it again where they
    run.

    Args:
        raw: Hydra's composed config, or the config of a Plan.
        build: instantiates a node. `schema.BuiltOnce` for plans whose objects are not used for a run.

    Raises:
        UserError: for every mistake that can be found without data.
    """
    check_preset(raw)
    config = resolve_config(raw)
    check_keys(config)
    config = with_absolute_places(config, get_original_cwd() if HydraConfig.initialized() else None)

    # Values on their own: each group against the signature of its constructor, then what no signature says.
    refuse_surgery(config["algorithm"])
    noted_domains = pop_recorded_domains(config["dataset"])
    config["model"] = with_declared_images(config["model"])
    refinements = pop_refinements(config["optimizer"])
    for group, supplied in SUPPLIED.items():
        config[group] = check(config[group], group, supplied)
    config["model"]["weights"] = canonical_weights(config["model"])
    coerce(config["on_code_change"], reuse.OnCodeChange, "on_code_change")
    config["model"] = with_file_of_run(config["model"])
    check_weights_file(config["model"])
    check_labels(config)
    check_callbacks(config)
    check_frozen_statistics(config["model"])

    # The domains, by their names in the config from now on: the run id needs them.
    source = data_source(config, build)
    check_recorded_domains(config["dataset"], noted_domains, source)
    split = build(config["split"])
    split.check(source.domains)
    check_official_split(split, source)
    config["dataset"]["domains"], config["split"]["target"] = list(source.domains), list(split.targets)

    # Values that have to fit one another.
    check_channels(config["model"], source)
    check_stored_size(config)
    try_optimizer(json.dumps(config["optimizer"]))
    config["optimizer"] |= refinements
    named_device(config["device"])
    algorithm, trainer = build(config["algorithm"]), build(config["trainer"])
    check_sources(config["algorithm"]["name"], algorithm, split.sources(source.domains), trainer.domains_per_step)
    check_unlabelled(config["algorithm"]["name"], algorithm, split)
    check_updates(config["algorithm"]["name"], algorithm, trainer)
    check_held_out(trainer, split)
    if selects_parameters(config, trainer):
        nodes = {key: config[key] for key in ("model", "algorithm", "optimizer")}
        try_setup(json.dumps(nodes), tuple(split.sources(source.domains)), trainer.head_only_steps > 0)
    return Plan(config, source, split, algorithm, trainer, build_callbacks(config, build))


def check_callbacks(config: dict) -> None:
    """Check the nodes of the groups logger and callbacks, several of which may be chosen; changes `config`."""
    for group in WATCHING:
        for name, node in config.get(group, {}).items():
            if not isinstance(node, dict) or "_target_" not in node:
                raise UserError(
                    f"{group}.{name}: found {node!r}, expected a node with a _target_.\n"
                    f"Write +{group}.{name}._target_=package.Class, or choose a file: {group}=NAME or '{group}=[A,B]'."
                )
            config[group][name] = check(node, f"{group}.{name}")


def build_callbacks(config: dict, build: Callable[..., Any] = build) -> dict[str, Callback]:
    """{name: object} of the loggers and the user's callbacks. UserError where a class is neither."""
    callbacks = {}
    for group, kind in WATCHING.items():
        for name, node in config.get(group, {}).items():
            callbacks[f"{group}.{name}"] = callback = build(node)
            if not isinstance(callback, kind):
                base = f"{kind.__module__}.{kind.__name__}"
                raise UserError(f"{group}.{name}: {node['_target_']} is no {kind.__name__}. Derive it from {base}.")
    return callbacks


def with_file_of_run(model: dict) -> dict:
    """The model's node, with one file of weights where `weights` is a run's folder. UserError: the run has none."""
    weights = model.get("weights")
    folder = Path(weights).expanduser() if isinstance(weights, str) else Path()
    return {**model, "weights": str(folder / find_weights(folder)["file"])} if weights and is_run(folder) else model


def resolve_config(raw: DictConfig | dict) -> dict:
    """The config as plain values: interpolated, with the values of its search's draw, without composition-only keys."""
    if isinstance(raw, DictConfig):
        require_arch(raw.get("model"))
        config = as_dict(apply_search(raw), resolve=True, throw_on_missing=True)
    else:
        config = copy.deepcopy(raw)
    for key in ("experiment", "resubmit"):
        config.pop(key, None)
    remove_unused(config)
    check_groups(config)
    if "n_parts" in config["algorithm"] and "n_parts" not in config["algorithm"].get("partition", {}):
        raise UserError("unknown key algorithm.n_parts: only algorithm/partition=chunk has parts to count.")
    if "arch" in config["model"] and "arch" not in (config["model"].get("backbone") or {}):
        raise UserError("unknown key model.arch: only model=timm and model=torchvision have architectures to choose.")
    # These are interpolated into the partition and the backbone already; algorithm.ranges is merged into the search.
    for key in ("n_parts", "ranges"):
        config["algorithm"].pop(key, None)
    if (kept := config["trainer"].pop("keep_weights", None)) is not None:  # its name until 2026-11
        config["trainer"]["keep"] = "last" if kept else "none"
    config["model"].pop("arch", None)
    if config["algorithm"].get("surgery", "none") is None:
        del config["algorithm"]["surgery"]
    config["algorithm"].get("surgery", {}).pop("ranges", None)
    if "search" in config:
        apply(config["search"], config)  # changes no value any more; refuses ranges for the keys removed above
    return config


def require_arch(model: object) -> None:
    """UserError if a model of timm or torchvision is chosen without its architecture."""
    if isinstance(model, DictConfig) and OmegaConf.is_missing(model, "arch"):
        raise UserError(
            "model.arch is missing: it names the architecture.\nWrite, for example, model=timm "
            "model.arch=vit_small_patch16_224, or model=torchvision model.arch=resnet34."
        )


def remove_unused(config: dict) -> None:
    """Remove the keys of conf/what_trains.yaml that keep their default: a user's model need not know them."""
    for group, unused in {"model": EVERYTHING_TRAINS, "optimizer": NOTHING}.items():
        if isinstance(node := config.get(group), dict):
            kept = {key: value for key, value in node.items() if key not in unused or value != unused[key]}
            config[group] = kept or None  # None: no model or optimizer was chosen


def apply_search(raw: DictConfig) -> DictConfig:
    """The config with the values that its search draws, before interpolation, so that references get them too."""
    if "search" not in raw:
        return raw
    config, search = copy.deepcopy(raw), raw.search
    if isinstance(search, DictConfig):
        search = merge_ranges(as_dict(search, resolve=True, throw_on_missing=True), ranges_of(config.algorithm))
        config.search = search
    apply(search, config)
    return config


def ranges_of(algorithm: DictConfig) -> dict:
    """The search ranges of an algorithm and of the gradient surgery on its losses: {name: range}."""
    of_algorithm, of_surgery = (
        as_dict(node.ranges, resolve=True) if node and "ranges" in node else {}
        for node in (algorithm, algorithm.get("surgery"))
    )
    for range_ in of_surgery.values():  # a surgery preset's keys are those of `algorithm=NAME`
        range_["key"] = range_["key"].replace("algorithm.", "algorithm.surgery.", 1)
    return of_algorithm | of_surgery
