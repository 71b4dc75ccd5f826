"""Methods and their labels: which runs are one row of a table, and what the row is called.

A method is a config, not a name: runs are averaged together only if their scientific configs are equal apart from the
target, the seeds and the values that a hyper-parameter search has drawn. (DomainBed averages all runs whose algorithm
has the same name.) So one algorithm name may stand for several methods, and a method's label is the name followed by
the settings that differ among them: `erm (alpha=0.3)` and `erm (alpha=0.6)`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from gsdg.analysis.read.run import Run
from gsdg.utils.errors import UserError, listing

SEARCHED = '"searched"'  # in a method's settings, the value of a key that a hyper-parameter search draws
# What a label says of a setting that is none of the algorithm's, unless it has this value: without it, a result with
# images of the target would look like one of domain generalization.
ALWAYS_SHOWN = {"split.uda_fraction": "0.0"}
RECORDERS = {"domainbed": "DomainBed", "swad": "SWAD"}  # source of a run -> what a label says; GSDG's own runs: nothing


@dataclass(frozen=True)
class Method:
    """What the runs in one row of a table have in common. Two methods are equal if all three attributes are.

    Args:
        name: the algorithm's name.
        settings: the part of the config that all of its runs share, flat, {dotted key: value as JSON}.
        recorder: the code base that wrote its runs, as in RECORDERS; "" for GSDG.
    """

    name: str
    settings: dict[str, str]
    recorder: str = ""

    def __hash__(self) -> int:
        return hash((self.name, self.recorder, frozenset(self.settings.items())))

    @classmethod
    def of(cls, run: Run) -> Method:
        return cls(run.metadata["algorithm"], run.settings, RECORDERS.get(run.metadata["source"], ""))

    def has_unusual(self, key: str) -> bool:
        """Whether a setting of ALWAYS_SHOWN has another value than the usual one."""
        return self.settings.get(key, ALWAYS_SHOWN[key]) != ALWAYS_SHOWN[key]

    def described(self, key: str) -> str:
        """`partition.n_parts=5`: one setting as labels show it, with the key as short as the command line allows."""
        return f"{key.removeprefix('algorithm.').removesuffix('.name')}={as_written(self.settings.get(key))}"


def label(runs: Sequence[Run]) -> None:
    """Replace each run's `algorithm` by the label of its method, among the methods of its data set."""
    by_dataset = defaultdict(list)
    for run in runs:
        by_dataset[run.metadata["dataset"]].append((run, Method.of(run)))
    for labelled in by_dataset.values():
        names = method_labels(method for _, method in labelled)
        for run, method in labelled:
            run.metadata["algorithm"] = names[method]


def method_labels(methods: Iterable[Method]) -> dict[Method, str]:
    """The label of each distinct method: `name`, or `name (recorder, key=value, ...)`.

    Shown are the settings that differ among the methods of the same name and recorder, and those of ALWAYS_SHOWN.
    """
    same_name: dict[tuple[str, str], dict[Method, None]] = defaultdict(dict)
    for method in methods:
        same_name[method.name, method.recorder][method] = None
    labels = {}
    for (name, recorder), distinct in same_name.items():
        for method, settings in zip(distinct, _distinguishing_settings(list(distinct)), strict=True):
            always = [method.described(key) for key in ALWAYS_SHOWN if method.has_unusual(key)]
            shown = [recorder] * bool(recorder) + settings + [text for text in always if text not in settings]
            labels[method] = f"{name} ({', '.join(shown)})" if shown else name
    return labels


def _distinguishing_settings(methods: Sequence[Method]) -> list[list[str]]:
    """For each of these distinct methods, in order, the `key=value`s that distinguish it from the others."""
    # Options of a node whose name differs say little: `partition=chunk` against `partition=model` is enough, and
    # n_parts is shown only if two methods use chunks.
    keys = sorted(_differing_keys(methods), key=lambda key: key.removesuffix(".name"))
    described: list[list[str]] = [[] for _ in methods]
    for key in keys:
        for settings, method, informative in zip(described, methods, _is_informative(key, methods), strict=True):
            if informative:
                settings.append(method.described(key))

    # Two methods with the same label would be one row of the table. So methods that still read the same get every key
    # in which they differ.
    same_label = defaultdict(list)
    for number, settings in enumerate(described):
        same_label[tuple(settings)].append(number)
    for numbers in same_label.values():
        for key in _differing_keys([methods[number] for number in numbers]):
            for number in numbers:
                described[number].append(methods[number].described(key))
    return described


def _differing_keys(methods: Sequence[Method]) -> list[str]:
    """The keys whose values differ among distinct methods, without keys that only repeat another one.

    Left out are interpolations of another key, and each `_target_` beside a `name` that differs too: unless methods
    exist that differ in their `_target_`s only.
    """
    every_key = sorted({key for method in methods for key in method.settings})
    values = {key: tuple(method.settings.get(key) for method in methods) for key in every_key}
    differing = [key for key in every_key if len(set(values[key])) > 1]
    keys = [key for key in differing if not any(_interpolates(key, other, values) for other in differing)]
    fewer = [key for key in keys if not (key.endswith("._target_") and key[: -len("_target_")] + "name" in keys)]
    return fewer if _count_distinct(methods, fewer) == _count_distinct(methods, keys) else keys


def _count_distinct(methods: Sequence[Method], keys: Sequence[str]) -> int:
    return len({tuple(method.settings.get(key) for key in keys) for method in methods})


def _interpolates(key: str, other: str, values: dict[str, tuple]) -> bool:
    """Whether `key` looks like an interpolation of `other`, as algorithm.total_steps is of trainer.steps."""
    longer, word = key.rpartition(".")[2], other.rpartition(".")[2]
    return longer != word and longer.endswith(f"_{word}") and values[key] == values[other]


def _is_informative(key: str, methods: Sequence[Method]) -> list[bool]:
    """For each method, whether `key` says more than the `name`s of the config nodes that contain it.

    A name itself is informative. An option is informative if its values differ among the methods whose containing
    nodes have the same names. A searched value is not, nor is a key that otherwise has only one value.
    """
    if len({method.settings.get(key) for method in methods} - {SEARCHED}) < 2:
        return [False] * len(methods)
    name_keys = [name for name in _containing_names(key) if any(name in method.settings for method in methods)]
    names = [tuple(method.settings.get(name) for name in name_keys) for method in methods]
    values_of = defaultdict(set)
    for nodes, method in zip(names, methods, strict=True):
        values_of[nodes].add(method.settings.get(key))
    return [
        method.settings.get(key) != SEARCHED and (key in name_keys or len(values_of[nodes]) > 1)
        for nodes, method in zip(names, methods, strict=True)
    ]


def _containing_names(key: str) -> list[str]:
    """`a.b.c` -> `a.name`, `a.b.name`."""
    words = key.split(".")
    return [".".join([*words[:depth], "name"]) for depth in range(1, len(words))]


def as_draws(runs: Sequence[Run], keys: Sequence[str]) -> None:
    """Turn runs that differ only in the values of `keys` into hyper-parameter draws of one method.

    The draws are numbered (`hparams_seed`) in the order of their values. Runs that have none of the keys, or whose own
    search draws all of the keys, stay as they are.

    Raises:
        UserError: no config has one of the keys, or a run is a draw of a search over other keys already.
    """
    valid = {key for run in runs for key in run.settings}
    full_keys = [full_key(key, valid) for key in keys]
    same_settings = defaultdict(list)
    for run in runs:
        if {run.settings.get(key, SEARCHED) for key in full_keys} == {SEARCHED}:
            continue
        if SEARCHED in run.settings.values():
            raise UserError(f"run {run.metadata['run_id']} is a draw of a search already: {run.metadata['drawn']}.")
        run.settings |= {key: SEARCHED for key in full_keys if key in run.settings}
        drawn = [f"{key.rpartition('.')[2]}={as_written(run.config.get(key))}" for key in full_keys]
        run.metadata["drawn"] = ", ".join(drawn)
        group = run.metadata["source"], run.metadata["dataset"], frozenset(run.settings.items())
        same_settings[group].append(run)
    for draws in same_settings.values():
        values = sorted({run.metadata["drawn"] for run in draws}, key=natural)
        numbers = {text: number for number, text in enumerate(values)}
        for run in draws:
            run.metadata["hparams_seed"] = numbers[run.metadata["drawn"]]


def full_key(key: str, valid: Collection[str]) -> str:
    """The config key that the user means by `key`: labels leave out `algorithm.` and `.name`.

    A short name of the command line, such as algorithm.n_parts, means the only key of its group with that last word.

    Raises:
        UserError: none of the `valid` keys fits; the message suggests similar ones.
    """
    meant = [full for full in (key, f"algorithm.{key}", f"{key}.name", f"algorithm.{key}.name") if full in valid]
    group, _, word = key.partition(".")
    in_group = [full for full in valid if full.startswith(f"{group}.") and full.endswith(f".{word}")] if word else []
    meant += in_group if len(in_group) == 1 else []
    if not meant:
        similar = sorted(other for other in valid if other.endswith(f".{key}"))
        similar = similar or get_close_matches(key, sorted(valid), n=3, cutoff=0.6)
        hint = f" Did you mean {' or '.join(similar)}?" if similar else f" Valid keys: {listing(sorted(valid))}."
        raise UserError(f"no run's config has a key {key!r}.{hint}")
    return meant[0]


def as_written(value: str | None) -> str:
    """A JSON value as a person writes it: strings without quotes, unless they would read as something else."""
    if value is None or not value.startswith('"'):
        return value or "unset"  # None: the config does not have the key
    try:
        json.loads(json.loads(value))
        return value
    except ValueError:
        return json.loads(value)


def natural(label: str) -> list[str | float]:
    """A sorting key that puts 5 before 10."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", label)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]
