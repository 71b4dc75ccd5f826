"""Which runs are kept: `--where key=value` and `--exclude key=value`, conditions on the runs' configs."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache

from gsdg.analysis.formats import few
from gsdg.analysis.read.labels import as_written, full_key
from gsdg.analysis.read.run import Run
from gsdg.runs.filters import ABSENT, has_value
from gsdg.utils.errors import UserError

MOST_VALUES = 12  # shown in an error message


def filter_runs(
    runs: list[Run], where: Sequence[str], exclude: Sequence[str], problems: list[tuple[str, str]]
) -> list[Run]:
    """The runs that meet the conditions; runs that are left out are added to `problems`.

    Args:
        where: `key=value` conditions. A run must have, for every key named here, one of the values given for it.
        exclude: `key=value` conditions, none of which a run may meet.

    Keys are written as in the configs or as in the tables' labels. The value `unset` means that the config does not
    have the key.

    Raises:
        UserError: text that is no condition, a key that no run's config has, a condition that no run meets, or no run
            left.
    """
    if not runs or not (where or exclude):
        return runs
    required = defaultdict(set)
    for key, matching in _conditions("--where", where, runs):
        required[key] |= matching
    excluded = set().union(*(matching for _, matching in _conditions("--exclude", exclude, runs)))
    kept = [run for run in runs if all(id(run) in ids for ids in required.values()) and id(run) not in excluded]
    options = " ".join([*(f"--where {text}" for text in where), *(f"--exclude {text}" for text in exclude)])
    if not kept:
        raise UserError(f"{options} leaves none of the {len(runs)} runs.\nLeave one of these conditions out.")
    kept_ids = {id(run) for run in kept}
    problems += [(run.metadata["run_id"], f"left out by {options}") for run in runs if id(run) not in kept_ids]
    return kept


def _conditions(option: str, conditions: Sequence[str], runs: Sequence[Run]) -> Iterator[tuple[str, set[int]]]:
    """For each condition (config key, `id`s of the runs that meet it)."""
    valid = {key for run in runs for key in run.config}
    for condition in conditions:
        key, equals, value = condition.partition("=")
        if not equals:
            raise UserError(f"{option} {condition}: expected KEY=VALUE, for example {option} optimizer.lr=0.001")
        key = full_key(key, valid)
        fits = cache(lambda text, value=value: has_value(_parse(text), value))  # cached: many runs share few values
        matching = {id(run) for run in runs if fits(run.config.get(key))}
        if not matching:
            counts = Counter(as_written(run.config.get(key)) for run in runs)
            values = few((f"{value} ({n})" for value, n in counts.most_common()), MOST_VALUES)
            raise UserError(f"{option} {condition}: no run has this value. Values of {key} (number of runs): {values}")
        yield key, matching


def _parse(text: str | None) -> object:
    """A value of a flat config, which is JSON."""
    return ABSENT if text is None else json.loads(text)
