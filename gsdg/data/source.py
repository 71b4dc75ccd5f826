"""Building the dataset object from a run's config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gsdg.config.schema import build, parameters_of, unknown
from gsdg.data import DataSource
from gsdg.utils.errors import UserError


def data_source(config: dict, build: Callable[..., Any] = build) -> DataSource:
    """Build the dataset object of config["dataset"]. This is cheap; its `read()` lists the files on disk.

    The config of a plan always has dataset.domains, because tables and run ids need it. It is passed on only if the
    class has such an argument: a user's own class may have fixed domains.

    Args:
        config: a run's config.
        build: instantiates a node with `_target_`, see `plan.prepare`.
    """
    node = config["dataset"]
    if "domains" not in parameters_of(node):
        node = {key: value for key, value in node.items() if key != "domains"}
    return build(node, data_dir=config["data_dir"])


def pop_recorded_domains(dataset: dict) -> list[str] | None:
    """If the dataset's class has no argument `domains`, remove that key from its node and return its value.

    An earlier `plan.prepare` added the key, because a plan's config always has it.
    """
    if "_target_" not in dataset or "domains" in parameters_of(dataset):
        return None
    return dataset.pop("domains", None)


def check_recorded_domains(dataset: dict, recorded: list[str] | None, source: DataSource) -> None:
    """UserError if the removed dataset.domains are not the dataset's domains: then the user set a key with no effect.

    Args:
        dataset: the dataset's node.
        recorded: the result of `pop_recorded_domains`.
        source: the dataset object.
    """
    if recorded is not None and list(recorded) != list(source.domains):
        raise UserError(unknown("dataset.domains", "domains", list(parameters_of(dataset))))
