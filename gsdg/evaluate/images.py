"""What a finished run is evaluated on: its own data set, split and transforms, or another data set of its classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import hydra
import numpy as np

from gsdg.config.command_line import check_words
from gsdg.config.config_dirs import initialized
from gsdg.config.places import absolute_path
from gsdg.config.schema import as_dict, build, check
from gsdg.data.cache.memory_map import as_arrays, in_memory
from gsdg.data.dataset import DomainDataset
from gsdg.evaluation import DomainMeans, Evaluator
from gsdg.experiment import choose_workers, evaluator_of, read_images
from gsdg.fits import check_channels
from gsdg.plan import SUPPLIED
from gsdg.predict import Predictor, plan_of
from gsdg.runs.reuse import data_digests, differences
from gsdg.utils.errors import UserError, listing
from gsdg.utils.json_files import load_json
from gsdg.utils.machine import usable_cores

COMMAND = "python -m gsdg.evaluate RUN"
ALL = "all"  # the part of a domain of another data set: all its images
KEYS = ("dataset", "data_dir", "adaptation")  # what an override may set
OF_THE_RUN = ("dataset.short_side", "dataset.augment")  # the run's own are used, or none


class Images(NamedTuple):
    """What a run is evaluated on.

    Args:
        evaluator: of the images; its data set has the run's classes.
        step: that the evaluator is called with: the one of the record, which seeds random transforms.
        about: what evaluation.json says: the data set, its folder, and the digests of its images.
        recorded: {domain: {part: accuracy}} in the run's record of these images; None: it has none.
    """

    evaluator: Evaluator
    step: int
    about: dict
    recorded: DomainMeans | None = None


class Settings(NamedTuple):
    """The overrides of an evaluation, composed.

    Args:
        dataset: the node of another data set; None: the run's own.
        data_dir: where the data sets lie; None: where the run found its own, or the default for another data set.
        adaptation: the node of a test-time adaptation; None: none.
    """

    dataset: dict | None
    data_dir: str | None
    adaptation: dict | None


def compose(overrides: Sequence[str], *, adapt: str | None, config_dir: Path | None) -> Settings:
    """Check and compose the overrides. UserError: one has no effect here, or a value is wrong.

    Args:
        overrides: key=value.
        adapt: a choice of the group `adaptation`; None: no adaptation.
        config_dir: folder with further choices.
    """
    _check_words(overrides, adapt)
    keys = [word.partition("=")[0] for word in overrides]
    with initialized(config_dir):
        config = hydra.compose("config", [*([f"+adaptation={adapt}"] if adapt else []), *overrides])
    nodes = as_dict(config, resolve=False)
    return Settings(
        check(as_dict(config.dataset, resolve=True), "dataset", SUPPLIED["dataset"]) if "dataset" in keys else None,
        absolute_path(nodes["data_dir"], key="data_dir") if {"data_dir", "dataset"} & {*keys} else None,
        check(nodes["adaptation"], "adaptation") if adapt else None,
    )


def _check_words(overrides: Sequence[str], adapt: str | None) -> None:
    check_words(overrides, COMMAND)
    for word in overrides:
        key = word.lstrip("+").partition("=")[0]
        if key.partition(".")[0] not in KEYS or key in OF_THE_RUN:
            raise UserError(
                f"{word} has no effect on an evaluation, which takes model, transform and split from the run.\n"
                "Valid: dataset=NAME, dataset.KEY=..., data_dir=..., and with --adapt adaptation.KEY=..."
            )
        if key.startswith("dataset.") and not any(other.startswith("dataset=") for other in overrides):
            raise UserError(f"{word}: name the data set too: dataset=NAME {word}")
        if key.startswith("adaptation") and not adapt:
            raise UserError(f"{word}: choose the adaptation by --adapt NAME.")


def images_of(predictor: Predictor, run: Path, settings: Settings, batch_size: int | None) -> Images:
    """The images to evaluate the run on. batch_size: images per forward pass; None: the run's."""
    if settings.dataset is None:
        return own_images(predictor, run, settings.data_dir, batch_size)
    return other_images(predictor, run, settings, batch_size)


def own_images(predictor: Predictor, run: Path, data_dir: str | None, batch_size: int | None) -> Images:
    """The images that the run was evaluated on, with its transforms. UserError: they are no longer the same."""
    plan = plan_of(load_json(run / "config.json"), data_dir=data_dir, batch_size=batch_size)
    dataset, spec = read_images(plan), predictor.algorithm.model.spec
    digests = data_digests(dataset)
    if phrases := differences(load_json(run / "identity.json"), {"data": digests}):
        name = plan.config["dataset"]["name"]
        raise UserError(
            f"{run}: the run was made with other images: {listing(phrases[:4])}.\n"
            f"Restore them, or evaluate it on those that are here, without its split: add dataset={name}"
        )
    workers = choose_workers(plan.trainer, dataset, predictor.device)
    evaluator = evaluator_of(plan, dataset, spec, workers=workers, device=predictor.device)
    row = predictor.about
    recorded = row["accuracy"] if batch_size is None else None
    return Images(evaluator, row["step"] or 0, _about(plan.config["dataset"], plan.config, digests), recorded)


def other_images(predictor: Predictor, run: Path, settings: Settings, batch_size: int | None) -> Images:
    """All images of another data set, without augmentation, prepared as in the run.

    UserError: the data set has a class that the run has not learned, or more channels than the model takes.
    """
    config, node = load_json(run / "config.json"), dict(settings.dataset or {})
    if "short_side" in node:
        node["short_side"] = config["dataset"].get("short_side")
    source = build(node, data_dir=settings.data_dir)
    check_channels(config["model"], source)
    dataset = source.read()
    digests = data_digests(dataset)
    if config["trainer"]["transform"] == "batched":
        dataset = as_arrays(dataset, source.cache)
    dataset = with_classes(dataset, predictor.classes)
    evaluator = Evaluator(
        dataset,
        {name: {ALL: np.arange(len(domain))} for name, domain in dataset.domains.items()},
        dict.fromkeys(dataset.domains, predictor.transform),
        batch_size=batch_size or predictor.batch_size,
        workers=0 if in_memory(dataset) else usable_cores(),
        seed=0,
        device=predictor.device,
        memory_format=plan_of(config).trainer.memory_format,
    )
    return Images(evaluator, 0, _about(node, settings._asdict(), digests))


def with_classes(dataset: DomainDataset, classes: Sequence[str]) -> DomainDataset:
    """The data set with labels that are indices of `classes`. UserError: it has a class that is not among them."""
    if unknown := [name for name in dataset.classes if name not in classes]:
        raise UserError(
            f"dataset={dataset.name} has classes that the run has not learned: {listing(unknown[:5])}.\n"
            f"The run's classes: {listing(classes)}. A data set needs the same names, or some of them."
        )
    index = np.array([list(classes).index(name) for name in dataset.classes], dtype=np.int64)
    domains = {
        name: dataclasses.replace(domain, labels=index[domain.labels]) for name, domain in dataset.domains.items()
    }
    return DomainDataset(dataset.name, list(classes), domains)


def _about(dataset: Mapping, places: Mapping, digests: dict) -> dict:
    return {"dataset": dict(dataset), "data_dir": places["data_dir"], "data": digests}
