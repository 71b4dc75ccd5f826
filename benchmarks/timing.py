"""Shared by all benchmarks: read options, run contenders in turn, take medians, print a table, write it as CSV."""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

BUDGET = 15.0  # seconds; a contender whose timed rounds have taken longer is left out of the remaining rounds

Row = dict[str, object]


class Time(NamedTuple):
    """The median time of a contender."""

    ms: float
    rounds: int  # number of timed rounds


def options(description: str, output: str, *, rounds: int | None = 11) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share.

    Args:
        description: the benchmark's docstring.
        output: name of the CSV file in benchmarks/results.
        rounds: default of --rounds; None for a benchmark that measures no times in rounds.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results") / output)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and set torch's number of threads and seed."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def medians(contenders: dict[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, Time]:
    """The median time of each contender. Prints progress to stderr.

    Every round runs every contender once, and one more round at the beginning warms up. A contender that returns a
    float has measured itself, in seconds (with `timed`), because it has work to do outside the clock. A slow contender
    takes part in the first rounds only, see BUDGET.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        begin = time.perf_counter()
        for name, call in contenders.items():
            values = seconds[name]
            if sum(values[1:]) < BUDGET:
                values.append(timed(call, device))
        print(f"  round {turn} of {rounds}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    return {name: Time(1e3 * statistics.median(values[1:]), len(values) - 1) for name, values in seconds.items()}


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call until its work on the device ends; if the call returns a float, this float."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return result if isinstance(result, float) else time.perf_counter() - start


def seconds_per_call(call: Callable[[], object], count: int, device: str) -> float:
    """Seconds per call of `count` calls in a row, so that launches overlap with the work on the device.

    On CUDA the time between two events on the current stream.
    """
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def provenance(device: str) -> Row:
    """Machine, versions, date and commit: the last columns of every results file."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "commit": commit(),
    }


def commit() -> str:
    """The commit, with `-dirty` if gsdg has other changes. On a machine without git or its history: $GSDG_COMMIT."""
    if name := os.environ.get("GSDG_COMMIT"):
        return name
    if not shutil.which("git"):
        return "unknown"
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "gsdg"], capture_output=True).returncode != 0
    return "unknown" if head.returncode else head.stdout.strip() + "-dirty" * changed


def show(rows: list[Row]) -> None:
    """Print the rows as a table."""
    widths = {key: max(len(str(row[key])) for row in [*rows, {key: key}]) for key in rows[0]}
    for row in [{key: key for key in rows[0]}, *rows]:
        print("  ".join(str(row[key]).rjust(width) for key, width in widths.items()), flush=True)


def save(rows: list[Row], output: Path) -> None:
    """Write the rows to `output`, and say so."""
    write(rows, output)
    print(f"written to {output}", flush=True)


def write(rows: list[Row], output: Path) -> None:
    """Write the rows to `output`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def report(rows: list[Row], output: Path) -> None:
    """Print the rows and write them to `output`."""
    show(rows)
    save(rows, output)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
