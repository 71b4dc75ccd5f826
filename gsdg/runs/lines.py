"""Cutting a run's files of JSON lines back to a checkpoint when the run is resumed. Standard library only."""

from __future__ import annotations

import logging
from pathlib import Path

from gsdg.utils.json_files import parse_object, raw_lines, replace_file

log = logging.getLogger(__name__)


def keep_lines_before(path: Path, step: int) -> None:
    """Keep the lines of the steps before `step`, unchanged. Lines that hold no record are removed with a warning."""
    lines = raw_lines(path)
    steps = [_step_of(line) for line in lines]
    kept = [line for line, recorded in zip(lines, steps, strict=True) if recorded is not None and recorded < step]
    content = b"".join(line + b"\n" for line in kept)
    if path.exists() and content != path.read_bytes():
        replace_file(path, content, flush=True)
    # The last line is not counted: a killed process may have left it truncated, and its step is recorded again.
    if damaged := steps[:-1].count(None):
        log.warning(
            "%s: %d of %d lines could not be read and are removed. If one of them was the record of a step before %d, "
            "that record is lost; force=true trains the run again from step 0.",
            path,
            damaged,
            len(lines),
            step,
        )


def _step_of(line: bytes) -> int | None:
    """The step of the record in a line; None if the line holds no record."""
    step = (parse_object(line) or {}).get("step")
    return step if isinstance(step, int) else None
