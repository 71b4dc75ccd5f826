"""What every benchmark does: run contenders in turn, take medians, print a table of ratios, write it as CSV."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch


def medians(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each contender; every round runs every one once, the first round warms up.

    A contender that returns a number has timed itself, in seconds: it has work to do outside the clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            own = call()
            seconds[name].append(own if isinstance(own, float) else time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values[1:]) for name, values in seconds.items()}


def provenance(device: str) -> dict[str, object]:
    """Where and when: the columns that every results file ends with."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "gsdg"]).returncode != 0
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "commit": commit + "-dirty" * changed,
    }


def report(rows: list[dict[str, object]], output: Path) -> None:
    """Print the rows and write them to `output`."""
    widths = {key: max(len(str(row[key])) for row in [*rows, {key: key}]) for key in rows[0]}
    for row in [{key: key for key in rows[0]}, *rows]:
        print("  ".join(str(row[key]).rjust(width) for key, width in widths.items()))
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {output}")
