"""Make the measurements of a part within its time, and keep their rows in one file.

A part that has too little time left for a measurement does not begin it, but adds a row that says so. A measurement
that fails adds a row with the error, and the next one begins. Rows are written after each measurement, so a part that
is killed loses one measurement.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from timing import Row, write

from gpu_parts.measurement import Measurement, Setting, Skipped, free_memory, row

LEFT_OUT, FAILED = "left out", "failed"


def measure_part(
    part: str, measurements: Sequence[Measurement], limit: float, setting: Setting, keep: Callable[[list[Row]], None]
) -> list[Row]:
    """Make the measurements one after the other until the time is up; `keep` gets the rows of each. Returns all rows.

    limit: seconds for the whole part.
    """
    end, rows = time.monotonic() + limit, []
    for measurement in measurements:
        print(f"{part}: {measurement.name}", file=sys.stderr, flush=True)
        left = end - time.monotonic()
        measured = _left_out(measurement, limit) if left < measurement.seconds else _measured(measurement, left)
        measured = [_labelled(own, part, measurement.name, setting) for own in measured]
        keep(measured)
        rows += measured
        free_memory(setting.device)
    return rows


def _left_out(measurement: Measurement, limit: float) -> list[Row]:
    reason = f"needs up to {measurement.seconds:.0f} s, too little was left of {limit:.0f} s"
    return [row(LEFT_OUT, note=f"{reason}; run it with --only {measurement.name!r}")]


def _measured(measurement: Measurement, left: float) -> list[Row]:
    try:
        return measurement.call(left)
    except Skipped as reason:
        return [row("skipped", note=str(reason))]
    except Exception as error:  # the next measurement may work
        return [row(FAILED, note=" ".join(f"{type(error).__name__}: {error}".split())[:600])]


def _labelled(own: Row, part: str, measurement: str, setting: Setting) -> Row:
    """The row with the names of its part and measurement; that of a self-test says so, and has no aim."""
    test = {"note": f"self-test, no result; {own['note']}".removesuffix("; "), "aim": ""} if setting.tiny else {}
    return {**own, "part": part, "measurement": measurement, **test}


def merge(output: Path, new: list[Row]) -> None:
    """Write `new`, the rows of one measurement, to `output`; they replace its rows of that measurement and device.

    A measurement that is left out replaces nothing.
    """
    old = _read(output, list(new[0]))
    same = [_key(own) == _key(new[0]) for own in old]
    if any(same) and all(own["what"] == LEFT_OUT for own in new):
        return
    write([own for own, replaced in zip(old, same, strict=True) if not replaced] + new, output)


def _key(own: Row) -> tuple[object, ...]:
    return own["part"], own["measurement"], own["device"]


def _read(output: Path, columns: list[str]) -> list[Row]:
    """The rows of the file with these columns; none if there is no file."""
    if not output.exists():
        return []
    with output.open(newline="") as file:
        return [{key: own.get(key) or "" for key in columns} for own in csv.DictReader(file)]
