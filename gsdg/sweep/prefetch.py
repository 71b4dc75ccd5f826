"""What a job needs from outside, brought or built on the login node: weights, data sets, decoded images.

Configs are a sweep's frozen, resolved ones. Whatever is looked at here is looked at by the job's own code, so the job
finds it at the same place, as long as it sees the same folders: data_dir, dataset.cache, torch.hub's cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gsdg.data.cache import Cache, in_memory
from gsdg.data.cache_build import NoRoom
from gsdg.data.domains import DomainDataset
from gsdg.errors import UserError
from gsdg.schema import build

if TYPE_CHECKING:
    from gsdg.models.weights import Pretrained

Say = Callable[[str], None]


def prepare(configs: Sequence[dict], say: Say = print) -> None:
    """Fetch, read and decode what the runs of these configs will look for, and `say` a line about each thing.

    UserError at the end, with everything that is not here and why.
    """
    problems: list[str] = []
    decode = {_data_key(config) for config in configs if config["trainer"]["transform"] == "batched"}
    classes = [
        _data_set(config, _data_key(config) in decode, say, problems) for config in _distinct(configs, _data_key)
    ]
    unfit = _weights(configs, say, problems)
    for config in _distinct(configs, _model_key):
        if _weights_key(config) not in unfit:
            with _noted(problems):
                _build(config, max(classes, default=1))
    if problems := list(dict.fromkeys(problems)):
        raise UserError("not everything is here:\n" + "\n".join(map(_item, problems)))
    say("everything is here: jobs need no internet")


def missing(configs: Sequence[dict]) -> list[str]:
    """A line for each data set and weights file that is not here, without reading, fetching or building any."""
    problems: list[str] = []
    for config in _distinct(configs, _data_key):
        with _noted(problems):
            source = _source(config)
            getattr(source, "check_present", lambda: None)()
    for config in _distinct(configs, _weights_key):
        with _noted(problems):
            if (pretrained := _pretrained(config["model"])) and not os.path.isfile(file := pretrained.file()):
                problems.append(f"model={config['model']['name']}: its weights are not at {file}")
    return list(dict.fromkeys(problems))


# ---- data ---------------------------------------------------------------------------------------------------------


def _data_set(config: dict, decode: bool, say: Say, problems: list[str]) -> int:
    """Read, and decoded where a run will want it so; how many classes it has, 1 if that cannot be told."""
    dataset = None
    with _noted(problems):
        source = _source(config)
        dataset = source.read()
        say(f"{source.name}: {_described(source, dataset)}")
        if decode and source.cache:
            say(f"{source.name}, decoded: {_decoded(dataset, source.cache)}")
    return len(dataset.classes) if dataset else 1


def _source(config: dict) -> object:
    return build(config["dataset"], data_dir=config["data_dir"])


def _described(source: object, dataset: DomainDataset) -> str:
    images = sum(map(len, dataset.domains.values()))
    where = getattr(source, "root", None) or ("in memory" if in_memory(dataset) else "on disk")
    return f"{images:,} images of {len(dataset.domains)} domains, {where}"


def _decoded(dataset: DomainDataset, cache: Cache) -> str:
    """Where the decoded images are, after decoding those that are not there yet. Raises as Cache.open."""
    if cache.off:
        return "dataset.cache=off, so every image is decoded at every draw"
    before = {name: cache.find(domain) for name, domain in dataset.domains.items()}
    try:
        folders = [folder or cache.folder(dataset.domains[name]) for name, folder in before.items()]
    except NoRoom as error:
        if not cache.auto:
            raise
        return f"no cache, so every image is decoded at every draw: {error}"
    new = sum(folder is None for folder in before.values())
    how = f"{new} of {len(before)} domains now" if new else "here already"
    return f"{how}: {_size(path for folder in folders for path in folder.iterdir())} in {folders[0].parent}"


# ---- weights ------------------------------------------------------------------------------------------------------


def _weights(configs: Sequence[dict], say: Say, problems: list[str]) -> set[str]:
    """Every weights file, fetched if need be; returns the `_weights_key`s of those that cannot be had."""
    unfit = set()
    for config in _distinct(configs, _weights_key):
        found = len(problems)
        with _noted(problems):
            say(f"{config['model']['name']}: {_fetched(config['model'])}")
        if len(problems) > found:
            unfit.add(_weights_key(config))
    return unfit


def _fetched(model: dict) -> str:
    if model.get("weights") is None:
        return "random weights, nothing to fetch"
    if not (pretrained := _pretrained(model)):
        return f"weights {model['weights']}, as its own code finds them"
    file = pretrained.file()
    before = os.path.isfile(file)
    pretrained.load()
    return f"weights {'here already' if before else 'fetched'}: {_size([file])} at {file}"


def _pretrained(model: dict) -> Pretrained | None:
    if model.get("weights") is None:
        return None
    from gsdg.models.weights import weights_source  # imports torch

    return weights_source(model)


def _build(config: dict, classes: int) -> None:
    """On the CPU, and not kept: what it refuses, a job would refuse hours later."""
    build(config["model"], classes=classes, precision=config["trainer"]["precision"])


# ---- helpers ------------------------------------------------------------------------------------------------------


def _data_key(config: dict) -> str:
    return json.dumps([config["dataset"], config["data_dir"]], sort_keys=True)


def _model_key(config: dict) -> str:
    return json.dumps(config["model"], sort_keys=True)


def _weights_key(config: dict) -> str:
    return json.dumps([config["model"].get("backbone"), config["model"].get("weights")], sort_keys=True)


def _distinct(configs: Iterable[dict], key: Callable[[dict], str]) -> list[dict]:
    """The first config of each key."""
    found: dict[str, dict] = {}
    for config in configs:
        found.setdefault(key(config), config)
    return list(found.values())


@contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Go on after what a user can mend, or the file system refuses; the end tells of it."""
    try:
        yield
    except (UserError, OSError) as error:
        problems.append(str(error))


def _item(problem: str) -> str:
    return "- " + problem.replace("\n", "\n  ")


def _size(files: Iterable[Path]) -> str:
    """`46.8 MB`."""
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"
