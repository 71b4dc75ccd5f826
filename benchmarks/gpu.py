"""What a GPU should show, in seven parts of at most nine minutes each. Not yet run on a GPU.

    python benchmarks/gpu.py --list                       # the parts: what each shows and its time
    python benchmarks/gpu.py --part step                  # one part; without --part all, one after the other
    python benchmarks/gpu.py --part step --only compiled  # what the part had no time for, or what is to be repeated

All parts write their rows to one file, benchmarks/results/gpu_<device name>.csv. A measurement that is made again
replaces its rows there. A part that has no time left for a measurement says so in a row, and so does a measurement that
fails; then the exit status is 1.

Without CUDA it tests itself on the CPU: every part with tiny sizes, in about two minutes on one core that is otherwise
idle. Times of the self-test mean nothing, and its rows are written only if --output names a file.

Where the copy of the code has no history of git, set GSDG_COMMIT to the commit. The parts `end_to_end` and
`side_by_side` take PACS from --data-dir, and generated images without it.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_parts import accuracy, cuda_tests, end_to_end, kernels, memory, side_by_side, step
from gpu_parts.budget import FAILED, measure_part, merge
from gpu_parts.measurement import Measurement, Setting
from timing import Row, options, parsed, provenance, show

LIMIT = 500.0  # seconds that a part measures; with the start of Python and the last rows less than nine minutes


class Part(NamedTuple):
    shows: str
    measurements: Callable[[Setting], list[Measurement]]


PARTS = {
    "tests": Part("the tests that need CUDA: passed, failed, skipped", cuda_tests.measurements),
    "kernels": Part("Triton kernels against the torch definition and the memory's bandwidth", kernels.measurements),
    "memory": Part("peak memory of ERM and GradSurgery, storage, micro_batch_size", memory.measurements),
    "accuracy": Part("the same run on the GPU and on the CPU", accuracy.measurements),
    "end_to_end": Part(
        "images per second of a run against bare steps, training and evaluation", end_to_end.measurements
    ),
    "side_by_side": Part("images per second of 1, 2 and 4 runs on one GPU", side_by_side.measurements),
    "step": Part("a step of ERM and GradSurgery: 3 networks, 4 precisions, eager and compiled", step.measurements),
}


def main() -> None:
    parser = _parser()
    args = parsed(parser)
    if args.list:
        print(*(f"{name:14}{part.shows} (at most {args.limit:.0f} s)" for name, part in PARTS.items()), sep="\n")
        return
    if args.device == "cpu":
        print("no CUDA: self-test on the CPU with tiny sizes; its numbers mean nothing", flush=True)
    output, rows = args.output or _default_output(args.device), []
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(args.device, Path(scratch), args.data_dir, rounds=2 if args.device == "cpu" else args.rounds)
        for name in args.part or PARTS:
            rows += run_part(name, setting, args.only, args.limit, output)
    failed = [f"{row['part']}: {row['measurement']}: {row['note']}" for row in rows if row["what"] == FAILED]
    failed += [f"{row['part']}: {row['measurement']}: {row['note']}" for row in rows if row["failed"]]
    sys.exit("\n".join(["failed:", *failed]) if failed else 0)


def run_part(name: str, setting: Setting, only: str, limit: float, output: Path | None) -> list[Row]:
    """Make one part, print its rows and merge them into `output`. Returns the rows.

    only: a part of the names of the measurements to make; "": all.
    """
    origin = provenance(setting.device)

    def keep(rows: list[Row]) -> None:
        if output:
            merge(output, [row | origin for row in rows])

    measurements = [m for m in PARTS[name].measurements(setting) if only in m.name]
    rows = measure_part(name, measurements, limit, setting, keep)
    if rows:
        show(_shown(rows))
    if output:
        print(f"written to {output}", flush=True)
    return rows


def _shown(rows: list[Row]) -> list[Row]:
    """The rows without empty columns, and without those that repeat what the measurement's name says."""
    hidden = ("part", "model", "domains", "precision")
    filled = [key for key in rows[0] if key not in hidden and any(row[key] != "" for row in rows)]
    return [{key: row[key] for key in filled} for row in rows]


def _default_output(device: str) -> Path | None:
    if device == "cpu":
        return None
    return Path("benchmarks/results") / f"gpu_{torch.cuda.get_device_name().replace(' ', '_')}.csv"


def _parser() -> argparse.ArgumentParser:
    parser = options(__doc__, "", rounds=5)
    on_gpu = torch.cuda.is_available()
    threads = torch.get_num_threads() if on_gpu else 1
    parser.set_defaults(output=None, threads=threads, device="cuda" if on_gpu else "cpu")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="may be given several times; default: all")
    parser.add_argument("--only", default="", help="only measurements whose names contain this")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of each part")
    parser.add_argument("--data-dir", type=Path, help="the folder that contains PACS/")
    parser.add_argument("--list", action="store_true", help="list the parts")
    return parser


if __name__ == "__main__":
    logging.captureWarnings(True)
    main()
