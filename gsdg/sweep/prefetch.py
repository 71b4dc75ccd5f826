"""`python -m gsdg.sweep prepare`: on the login node, downloads weights, reads data sets and decodes images for jobs.

All configs are frozen, resolved ones. Every file is looked up with the code that the jobs use, so a job finds it at the
same path, as long as it sees the same folders: data_dir, dataset.cache, torch.hub's cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gsdg.config.schema import build
from gsdg.data import DataSource
from gsdg.data.cache.builder import CacheUnavailable
from gsdg.data.cache.memory_map import Cache, in_memory
from gsdg.data.dataset import DomainDataset
from gsdg.data.source import data_source
from gsdg.utils.errors import UserError

if TYPE_CHECKING:
    from gsdg.models.weights import Pretrained

Say = Callable[[str], None]


def prefetch(configs: Sequence[dict], say: Say = print) -> None:
    """Download, read and decode everything that the runs of these configs will need.

    Args:
        configs: the configs of the runs.
        say: prints a line about each data set and each weights file.

    Raises:
        UserError: at the end, with the list of everything that is missing, and why.
    """
    problems: list[str] = []
    # Data sets: read once each, and decoded if at least one run uses decoded images.
    to_decode = {_data_key(config) for config in configs if config["trainer"]["transform"] == "batched"}
    class_counts = [
        _data_set(config, _data_key(config) in to_decode, say, problems) for config in _distinct(configs, _data_key)
    ]
    # Models: built once each, because a job would find a mistake of their config only hours later.
    unavailable = _weights(configs, say, problems)
    for config in _distinct(configs, _model_key):
        if _weights_key(config) not in unavailable:
            with _collected(problems):
                _build(config, max(class_counts))
    if problems := list(dict.fromkeys(problems)):
        raise UserError("not everything is here:\n" + "\n".join(map(_item, problems)))
    say("everything is here: jobs need no internet")


def missing_inputs(configs: Sequence[dict]) -> list[str]:
    """A line for each data set and weights file that is missing on this host. Reads and downloads nothing."""
    problems: list[str] = []
    for config in _distinct(configs, _data_key):
        with _collected(problems):
            source = data_source(config)
            getattr(source, "check_present", lambda: None)()
    for config in _distinct(configs, _weights_key):
        with _collected(problems):
            if (pretrained := _pretrained(config["model"])) and not os.path.isfile(file := pretrained.file()):
                problems.append(f"model={config['model']['name']}: its weights are not at {file}")
    return list(dict.fromkeys(problems))


# ---- data ---------------------------------------------------------------------------------------------------------


def _data_set(config: dict, decode: bool, say: Say, problems: list[str]) -> int:
    """Read the data set and, with `decode`, decode its images; its number of classes, 1 if it cannot be read."""
    dataset = None
    with _collected(problems):
        source = data_source(config)
        dataset = source.read()
        say(f"{source.name}: {_described(source, dataset)}")
        if decode and source.cache:
            say(f"{source.name}, decoded: {_decoded(dataset, source.cache)}")
    return len(dataset.classes) if dataset else 1


def _described(source: DataSource, dataset: DomainDataset) -> str:
    images = sum(map(len, dataset.domains.values()))
    where = getattr(source, "root", None) or ("in memory" if in_memory(dataset) else "on disk")
    return f"{images:,} images of {len(dataset.domains)} domains, {where}"


def _decoded(dataset: DomainDataset, cache: Cache) -> str:
    """Decode the images of the domains that are not in the cache yet; a text that says where they are.

    Raises as `Cache.open`.
    """
    if cache.off:
        return "dataset.cache=off, so every image is decoded at every draw"
    before = {name: cache.find(domain) for name, domain in dataset.domains.items()}
    try:
        folders = [folder or cache.folder(dataset.domains[name]) for name, folder in before.items()]
    except CacheUnavailable as error:
        if not cache.auto:
            raise
        return f"no cache, so every image is decoded at every draw: {error}"
    new = sum(folder is None for folder in before.values())
    how = f"{new} of {len(before)} domains now" if new else "here already"
    return f"{how}: {_size(path for folder in folders for path in folder.iterdir())} in {folders[0].parent}"


# ---- weights ------------------------------------------------------------------------------------------------------


def _weights(configs: Sequence[dict], say: Say, problems: list[str]) -> set[str]:
    """Download the weights files that are missing; the `_weights_key`s of those that could not be downloaded."""
    unavailable = set()
    for config in _distinct(configs, _weights_key):
        problems_before = len(problems)
        with _collected(problems):
            say(f"{config['model']['name']}: {_download(config['model'])}")
        if len(problems) > problems_before:
            unavailable.add(_weights_key(config))
    return unavailable


def _download(model: dict) -> str:
    """Download the model's weights file if it is missing; a text that says where it is."""
    if model.get("weights") is None:
        return "random weights, nothing to download"
    if not (pretrained := _pretrained(model)):
        return f"weights {model['weights']}, which the model's own code loads"
    was_here = os.path.isfile(pretrained.file())
    pretrained.load()
    file = pretrained.file()  # only now known, if the name of its folder came with the download
    return f"weights {'here already' if was_here else 'downloaded'}: {_size([file])} at {file}"


def _pretrained(model: dict) -> Pretrained | None:
    if model.get("weights") is None:
        return None
    from gsdg.models.weights import weights_source  # imports torch

    return weights_source(model)


def _build(config: dict, classes: int) -> None:
    """Build the model on the CPU, to check its config, and discard it."""
    build(config["model"], classes=classes, precision=config["trainer"]["precision"])


# ---- helpers ------------------------------------------------------------------------------------------------------


def _data_key(config: dict) -> str:
    return json.dumps([config["dataset"], config["data_dir"]], sort_keys=True)


def _model_key(config: dict) -> str:
    return json.dumps(config["model"], sort_keys=True)


def _weights_key(config: dict) -> str:
    return json.dumps([config["model"].get("backbone"), config["model"].get("weights")], sort_keys=True)


def _distinct(configs: Iterable[dict], key: Callable[[dict], str]) -> list[dict]:
    """The first config of each distinct key."""
    first: dict[str, dict] = {}
    for config in configs:
        first.setdefault(key(config), config)
    return list(first.values())


@contextmanager
def _collected(problems: list[str]) -> Generator[None]:
    """Add a UserError or OSError to `problems` and continue, so that all problems are reported together."""
    try:
        yield
    except (UserError, OSError) as error:
        problems.append(str(error))


def _item(problem: str) -> str:
    return "- " + problem.replace("\n", "\n  ")


def _size(files: Iterable[Path]) -> str:
    """`46.8 MB`."""
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"
