"""Which runs are read at all: `--where key=value` and `--exclude key=value`, on the runs' configs."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from analysis.formats import few
from analysis.labels import as_written, full_key
from analysis.run import Run
from gsdg.errors import UserError

MOST = 12  # values of a key in a message


def filtered(
    runs: list[Run], where: Sequence[str], exclude: Sequence[str], problems: list[tuple[str, str]]
) -> list[Run]:
    """The runs that have, of every key in `where`, one of the values given for it, and no value of `exclude`.

    Each is `key=value`, the key as configs or the tables' labels write it; the value `unset` means a config without the
    key. What is left out is added to `problems`. UserError for text that is no condition, a key that no run's config
    has, a condition that no run meets, and where no run is left.
    """
    if not runs or not (where or exclude):
        return runs
    wanted = defaultdict(set)
    for key, matching in _conditions("--where", where, runs):
        wanted[key] |= matching
    unwanted = set().union(*(matching for _, matching in _conditions("--exclude", exclude, runs)))
    kept = [run for run in runs if all(id(run) in some for some in wanted.values()) and id(run) not in unwanted]
    options = " ".join([*(f"--where {one}" for one in where), *(f"--exclude {one}" for one in exclude)])
    if not kept:
        raise UserError(f"{options} leaves none of the {len(runs)} runs.\nLeave one of these conditions out.")
    names = {id(run) for run in kept}
    problems += [(run.facts["run_id"], f"left out by {options}") for run in runs if id(run) not in names]
    return kept


def _conditions(option: str, conditions: Sequence[str], runs: Sequence[Run]) -> Iterator[tuple[str, set[int]]]:
    """(config key, `id` of the runs that meet it) of each condition."""
    known = {key for run in runs for key in run.config}
    for condition in conditions:
        key, equals, value = condition.partition("=")
        if not equals:
            raise UserError(f"{option} {condition}: expected KEY=VALUE, for example {option} optimizer.lr=0.001")
        key = full_key(key, known)
        matching = {id(run) for run in runs if _is(value, run.config.get(key))}
        if not matching:
            counts = Counter(as_written(run.config.get(key)) for run in runs)
            values = few((f"{value} ({n})" for value, n in counts.most_common()), MOST)
            raise UserError(
                f"{option} {condition}: no run has this value. Values of {key}, and of how many runs: {values}"
            )
        yield key, matching


def _is(text: str, value: str | None) -> bool:
    """Whether `text` is how a user writes the JSON `value`: 1e-3 for 0.001, photo for ["photo"], unset for None."""
    if value is None or text in (value, as_written(value)):
        return value is not None or text == "unset"
    content = json.loads(value)
    if isinstance(content, list) and len(content) == 1:
        return _is(text, json.dumps(content[0]))
    try:
        return type(content) in (int, float) and float(text) == content
    except ValueError:
        return False
