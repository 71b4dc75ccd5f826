"""What a reader of run folders hands on, whoever wrote the folder: one `Run`. No pandas."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Evaluations = dict[int, dict[str, dict[str, float]]]  # {step: {domain: {part: accuracy, a fraction}}}


class NotARun(Exception):
    """Why a folder is left out."""


@dataclass
class Run:
    """facts: the columns of `frames.STATUS`, its algorithm without what tells methods of one name apart.

    config: the whole config, flat, {dotted key: value as JSON}; method: that part of it which two runs of one method
    share. problems: what was left out of it and why.
    """

    facts: dict
    config: dict[str, str]
    method: dict[str, str]
    evaluations: Evaluations
    problems: list[str] = field(default_factory=list)
    columns: tuple = ()  # of the evaluations, once they are columns


def flat(nested: dict) -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}; an empty dict and a list are values."""
    found = {}
    waiting = list(nested.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict) and value:
            waiting += [(f"{key}.{inner}", item) for inner, item in value.items()]
        else:
            found[key] = repr(value) if type(value) is int else json.dumps(value)
    return found


def read_json_lines(path: Path, take: Callable[[dict], None]) -> list[str]:
    """Hand every whole line to `take`; what it (KeyError, TypeError, ValueError) or JSON refuses is told, once a kind.

    A last line without its newline is being written, or was when its process was killed: no result yet.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    bad = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            if line.strip():
                take(json.loads(line))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            bad.append(f"unreadable record in line {number} ({_said(error)})")
    return first_of(bad) + ["a truncated last record is left out"] * bool(lines[-1].strip())


def first_of(problems: list[str], consequence: str = "") -> list[str]:
    """The first of many alike and how many there are: a run in another format has a thousand."""
    more = f", and {len(problems) - 1} more like it" if len(problems) > 1 else ""
    return [f"{problems[0]}{more}" + f": {consequence}" * bool(consequence)] if problems else []


def _said(error: Exception) -> str:
    return f"no {error} in it" if isinstance(error, KeyError) else str(error)


def repeated(number: int) -> list[str]:
    return [f"records that repeat a step (a relaunched job): {number}; the last of each counts"] if number else []


def is_fraction(value: object) -> bool:
    return type(value) in (float, int) and 0 <= value <= 1


def said_values(values: dict) -> str:
    """`lr=2.7e-05, batch_size=39`: the numbers among the values, to four digits."""
    numbers = {key: value for key, value in values.items() if type(value) in (float, int)}
    return ", ".join(f"{key}={value:.4g}" for key, value in numbers.items())


def printable(text: str) -> str:
    """JSON may hold half of a character (a lone surrogate), which no file and no frame can."""
    return text.encode("utf-8", "replace").decode("utf-8")
