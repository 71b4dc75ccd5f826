"""Which runs are one method, and what it is called: its algorithm's name, and what tells it from others of that name.

A method is a config, not a name: runs are put together only if their scientific configs are equal apart from the
target, the seeds and what a hyper-parameter search has drawn. DomainBed puts together whatever has the same
algorithm name.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from difflib import get_close_matches

from analysis.run import Run
from gsdg.errors import UserError, listing

SEARCHED = '"searched"'  # stands in a method for a value that a search has drawn
SAID_BY = {"domainbed": "DomainBed", "swad": "SWAD"}


def label(runs: Sequence[Run]) -> None:
    """Append to the algorithms' names who recorded them, if not us, and what differs between methods of one name."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.facts["source"], run.facts["dataset"], run.facts["algorithm"]].append(run)
    for (source, _, _), members in groups.items():
        methods = [run.method for run in members]
        keys = sorted(_differing(methods), key=lambda key: key.removesuffix(".name"))
        values = {key: {method.get(key) for method in methods} for key in keys}
        shown = [[key for key in keys if _tells(key, method, methods, values[key])] for method in methods]
        recorder = [SAID_BY[source]] if source in SAID_BY else []
        for run, words in zip(members, _told_apart(methods, shown), strict=True):
            run.facts["algorithm"] += f" ({', '.join(recorder + words)})" if recorder + words else ""


def _told_apart(methods: Sequence[dict[str, str]], shown: Sequence[list[str]]) -> list[list[str]]:
    """`key=value` of the keys `shown` of each method; of methods that read the same, also the keys they differ in.

    Two methods of one label would be one row of the table.
    """
    words = [
        [f"{_short(key)}={as_written(method.get(key))}" for key in keys]
        for method, keys in zip(methods, shown, strict=True)
    ]
    alike = defaultdict(list)
    for number, label in enumerate(words):
        alike[tuple(label)].append(number)
    for numbers in alike.values():
        for key in _differing([methods[number] for number in numbers]):
            for number in numbers:
                words[number].append(f"{_short(key)}={as_written(methods[number].get(key))}")
    return words


def as_draws(runs: Sequence[Run], keys: Sequence[str]) -> None:
    """Make runs that differ in `keys` only draws of one method, numbered in the order of their values.

    Runs of a search that draws all of the `keys` keep its draws. UserError for a key that no config has, and for a key
    that a run's search does not draw.
    """
    known = {key for run in runs for key in run.method}
    full = [full_key(key, known) for key in keys]
    groups = defaultdict(list)
    for run in runs:
        if {run.method.get(key, SEARCHED) for key in full} == {SEARCHED}:
            continue  # without the keys (another code base's, for example), or a search has drawn them already
        if SEARCHED in run.method.values():
            raise UserError(f"run {run.facts['run_id']} is a draw of a search already: {run.facts['drawn']}.")
        run.method |= {key: SEARCHED for key in full if key in run.method}
        run.facts["drawn"] = ", ".join(f"{key.rpartition('.')[2]}={as_written(run.config.get(key))}" for key in full)
        groups[run.facts["source"], run.facts["dataset"], tuple(sorted(run.method.items()))].append(run)
    for members in groups.values():
        drawn = sorted({run.facts["drawn"] for run in members}, key=natural)
        for run in members:
            run.facts["hparams_seed"] = drawn.index(run.facts["drawn"])


def full_key(key: str, known: Collection[str]) -> str:
    """The one of the `known` keys that `key` means: labels leave out `algorithm.` and `.name`. UserError if none is."""
    found = [full for full in (key, f"algorithm.{key}", f"{key}.name", f"algorithm.{key}.name") if full in known]
    if not found:
        close = get_close_matches(key, sorted(known), n=3, cutoff=0.4)
        raise UserError(f"no run's config has a key {key!r}. Did you mean one of: {listing(close)}?")
    return found[0]


def _differing(methods: Sequence[dict[str, str]]) -> list[str]:
    """The keys whose values differ, without copies of others and `_target_`s that the `name` beside them tells."""
    distinct = [dict(method) for method in {tuple(sorted(method.items())) for method in methods}]
    every = sorted({key for method in distinct for key in method})
    values = {key: tuple(method.get(key) for method in distinct) for key in every}
    differ = [key for key in every if len(set(values[key])) > 1]
    keys = [key for key in differ if not any(_repeats(key, other, values) for other in differ)]
    fewer = [key for key in keys if not (key.endswith("._target_") and key[: -len("_target_")] + "name" in keys)]
    counts = [len({tuple(method.get(key) for key in some) for method in distinct}) for some in (fewer, keys)]
    return fewer if counts[0] == counts[1] else keys


def _repeats(key: str, other: str, values: dict[str, tuple]) -> bool:
    """Whether `key` is an interpolation of `other`, as algorithm.total_steps is of trainer.steps."""
    longer, word = key.rpartition(".")[2], other.rpartition(".")[2]
    return longer != word and longer.endswith(f"_{word}") and values[key] == values[other]


def _tells(key: str, method: dict[str, str], methods: Sequence[dict[str, str]], values: set) -> bool:
    """Whether `key` says more of a node than the `name`s above it: it differs between nodes of those names too."""
    if method.get(key) == SEARCHED or len(values - {SEARCHED}) < 2:
        return False
    names = [name for name in _names_above(key) if any(name in other for other in methods)]
    peers = [other for other in methods if all(other.get(name) == method.get(name) for name in names)]
    return key in names or len({other.get(key) for other in peers}) > 1


def _names_above(key: str) -> list[str]:
    """`a.b.c` -> `a.name`, `a.b.name`."""
    words = key.split(".")
    return [".".join([*words[:depth], "name"]) for depth in range(1, len(words))]


def _short(key: str) -> str:
    """`algorithm.partition.name` -> `partition`: what the override is called, but for the group's own prefix."""
    return key.removeprefix("algorithm.").removesuffix(".name")


def as_written(value: str | None) -> str:
    """JSON as a person writes it: a string loses its quotes unless it would read as something else."""
    if value is None or not value.startswith('"'):
        return value or "unset"  # this config lacks the key
    try:
        json.loads(json.loads(value))
        return value
    except ValueError:
        return json.loads(value)


def natural(label: str) -> list[str | float]:
    """A sorting key that puts 5 before 10."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", label)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]
