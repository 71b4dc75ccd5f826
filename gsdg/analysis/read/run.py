"""`Run`: what every `Reader` of run folders returns, whichever code base wrote the folder. Does not use pandas."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeGuard

Evaluations = dict[int, dict[str, dict[str, float]]]  # {step: {domain: {part: value}}}, part: in, out, uda


class NotARun(Exception):
    """The folder does not hold a readable run; the message says why."""


@dataclass
class Run:
    """One training run, read from its folder.

    Args:
        metadata: the run's row of the status table, {column: value} (columns: `frames.STATUS`). `algorithm` is the
            algorithm's name at first; `labels.label` replaces it by the label of the run's method.
        config: the whole config, flat, {dotted key: value as JSON}.
        settings: the part of the config that all runs of one method share, in the same form; see `labels.Method`.
        evaluations: the recorded accuracies, in [0, 1].
        scores: the other metrics that were recorded, {name: evaluations}; names of `gsdg.metrics.METRICS`.
        problems: messages about what could not be read, or was left out.
        columns: the evaluations of one metric as three arrays, once `frames.EvaluationEncoder` has encoded them.
    """

    metadata: dict
    config: dict[str, str]
    settings: dict[str, str]
    evaluations: Evaluations
    problems: list[str] = field(default_factory=list)
    scores: dict[str, Evaluations] = field(default_factory=dict)
    columns: tuple = ()


class Reader(Protocol):
    """Reads the run folders of one code base. `frames.READERS` lists the readers by the file that marks such a folder.

    The runs of several code bases go into the same tables. So a reader translates the names of data sets and domains
    into those of GSDG's configs, and percentages into fractions.
    """

    def __call__(self, folder: Path) -> list[Run]:
        """The runs in `folder`, at least one. Only the file that marks the folder is sure to exist.

        Every run has:
            metadata: every column of `frames.STATUS` except `folder`, which `frames` adds. Another `source` than those
                known gets its name for the tables in `labels.RECORDERS` and `tables.SOURCES`.
            config: the values by which --where and --exclude keep runs; any keys.
            settings: for runs of one method equal, whatever their target, seeds and drawn hyper-parameters.
            evaluations: {step >= 0: {domain: {"in" or "out": accuracy in [0, 1]}}}. The table reports the target's
                `in`; selections validate by `out`. Values that are missing or no fractions are left out.
            scores: the same of other metrics, if the code base records any (`Metric.is_valid` says which values count).
            problems: a message about everything that was left out.

        Raises:
            NotARun: the folder holds no readable run; the message says why, and reading goes on with the next folder.
        """
        ...


def flatten(nested: dict) -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}: dotted keys, values as JSON. Empty dicts and lists are values."""
    flat = {}
    waiting = list(nested.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict) and value:
            waiting += [(f"{key}.{inner}", item) for inner, item in value.items()]
        else:
            flat[key] = repr(value) if type(value) is int else json.dumps(value)
    return flat


def read_json_lines(path: Path, handle: Callable[[dict], None]) -> list[str]:
    """Call `handle` with every complete line of a JSON-lines file; return messages about the lines that were skipped.

    A line is skipped if it is no JSON, or if `handle` raises AttributeError, KeyError, TypeError or ValueError. Many
    skipped lines give one message. A last line without a newline is skipped too: it is still being written, or its
    process was killed while writing it. A file that does not exist has no lines.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    unreadable = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            if line.strip():
                handle(json.loads(line))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            unreadable.append(f"unreadable record in line {number} ({_reason(error)})")
    return summarize_problems(unreadable) + ["a truncated last record is left out"] * bool(lines[-1].strip())


def summarize_problems(problems: list[str], consequence: str = "") -> list[str]:
    """The first of many similar messages, with the number of the others; [] for none.

    Args:
        consequence: appended after a colon, for example "left out".
    """
    more = f", and {len(problems) - 1} more like it" if len(problems) > 1 else ""
    return [f"{problems[0]}{more}" + f": {consequence}" * bool(consequence)] if problems else []


def _reason(error: Exception) -> str:
    return f"no {error} in it" if isinstance(error, KeyError) else str(error)


def repeated_steps(count: int) -> list[str]:
    """The message about `count` records whose step was recorded again later; [] for none."""
    return [f"records that repeat a step (a relaunched job): {count}; the last of each counts"] if count else []


def is_fraction(value: object) -> TypeGuard[float]:
    return (type(value) is float or type(value) is int) and 0 <= value <= 1


def describe_draw(values: dict) -> str:
    """`lr=2.7e-05, batch_size=39`: the numbers among a draw's values, with four significant digits."""
    numbers = {key: value for key, value in values.items() if type(value) in (float, int)}
    return ", ".join(f"{key}={value:.4g}" for key, value in numbers.items())


def printable(text: str) -> str:
    """The text with lone surrogates, which JSON allows but neither files nor frames can hold, replaced by `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")
