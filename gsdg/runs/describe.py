"""Runs as text: a table of many runs, all about one run, sizes and ages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from gsdg.runs.filters import ABSENT, value_at
from gsdg.runs.inventory import FoundRun
from gsdg.utils.json_files import read_lines
from gsdg.utils.text import align_columns

COLUMNS = {  # {column of the table: the dotted key of a config that it shows}
    "algorithm": "algorithm.name",
    "dataset": "dataset.name",
    "target": "split.target",
    "trial": "split.trial_seed",
    "seed": "seed",
}
START_FIELDS = ("time", "host", "job", "device", "code", "commit")  # shown of a line of environment.jsonl


def describe_run(run: FoundRun, needed: str) -> list[str]:
    """Lines `name  value` about one run. needed: which process or task still needs the run, in words."""
    step, steps = run.status.get("step") or 0, run.status.get("steps") or value_at(run.config, "trainer.steps")
    values = {
        "run": f"{run.run_id}: {run.state}, step {step} of {steps}",
        "reason": run.status.get("reason"),
        "folder": str(run.path),
        **{name: _config_value(run, key) for name, key in COLUMNS.items()},
        "last sign of life": f"{age(run)} ago",
        **_last_start(run.path),
        "last record": _last_record(run.path),
        "size": format_sizes(run.sizes),
        "needed": needed,
    }
    return align_columns([(name, str(value)) for name, value in values.items() if value not in (None, "")])


def table(runs: Sequence[FoundRun]) -> list[str]:
    """A header and one line per run, with aligned columns."""
    rows = [["run", "state", *COLUMNS, "step", "last sign", "MB"]]
    for run in runs:
        values = [_config_value(run, key) for key in COLUMNS.values()]
        size = f"{sum(run.sizes.values()) / 1e6:,.1f}"
        rows.append([run.run_id, run.state, *values, str(run.status.get("step") or 0), f"{age(run)} ago", size])
    return align_columns(rows)


def age(run: FoundRun) -> str:
    """How long ago the run was last seen: `45 s`, `12 min`, `3.5 h` or `12.1 days`."""
    seconds = max(0.0, time.time() - run.last_seen)
    for limit, unit, text in ((100, 1, "{:.0f} s"), (6000, 60, "{:.0f} min"), (48 * 3600, 3600, "{:.1f} h")):
        if seconds < limit:
            return text.format(seconds / unit)
    return f"{seconds / 86400:.1f} days"


def _config_value(run: FoundRun, key: str) -> str:
    value = value_at(run.config, key)
    if value is ABSENT:
        return "-"
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _last_start(path: Path) -> dict[str, object]:
    """The number of starts of a run, and where, when and with which code the last one was."""
    starts = read_lines(path / "environment.jsonl")
    if not starts:
        return {}
    return {"starts": len(starts), **{key: starts[-1].get(key) for key in START_FIELDS}}


def _last_record(path: Path) -> str:
    """`step 300: photo in 99.1 %, photo out 95.0 %`; "" if nothing is recorded yet."""
    records = read_lines(path / "records.jsonl")
    if not records:
        return ""
    accuracies = [
        f"{domain} {part} {100 * value:.1f} %"
        for domain, parts in records[-1].get("accuracy", {}).items()
        for part, value in parts.items()
    ]
    return f"step {records[-1].get('step')}: {', '.join(accuracies)}"


def format_megabytes(size: float) -> str:
    """Bytes as text: `1,330.0 MB`."""
    return f"{size / 1e6:,.1f} MB"


def format_sizes(sizes: dict[str, int]) -> str:
    """`133.0 MB: checkpoints 0.0 MB, weights 130.2 MB, records and the rest 2.8 MB`."""
    parts = ", ".join(f"{kind} {format_megabytes(size)}" for kind, size in sizes.items())
    return f"{format_megabytes(sum(sizes.values()))}: {parts}"
