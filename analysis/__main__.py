"""`python -m analysis RUNS_DIR`: the leave-one-domain-out table from the run folders on disk."""

from __future__ import annotations

import argparse
import sys

from analysis.frames import read_runs
from analysis.selection import METHODS
from analysis.tables import csv, missing_lines, notes, report, summary
from gsdg.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    run_ids = options.runs.split(",") if options.runs else None
    try:
        if options.format == "text":
            print(report(options.runs_dir, options.selection, run_ids))
        else:
            _print_csv(options.runs_dir, options.selection, run_ids)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _print_csv(runs_dir: str, selections: list[str], run_ids: list[str] | None) -> None:
    """The numbers on stdout; what is missing on stderr, where it does not break a reader."""
    runs = read_runs(runs_dir, run_ids)
    cells, missing = summary(runs, selections)
    print(csv(cells), end="")
    for (dataset, selection), gaps in missing.groupby(["dataset", "selection"], sort=False):
        print("\n".join([f"{dataset}, {selection}", *missing_lines(gaps)]), file=sys.stderr)
    print(notes(runs), end="\n" if notes(runs) else "", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m analysis", description=__doc__.strip())
    parser.add_argument("runs_dir", help="the folder that holds the run folders (runs_dir of the training)")
    parser.add_argument(
        "--selection", nargs="+", choices=METHODS, default=["training_domain"], metavar="METHOD",
        help=f"how a run's step is chosen, one or more of: {', '.join(METHODS)} (default: training_domain)",
    )  # fmt: skip
    parser.add_argument("--format", choices=["text", "csv"], default="text")
    parser.add_argument("--runs", metavar="ID,ID", help="only these runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
