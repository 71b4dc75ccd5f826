"""Prints the tables of run folders. Runs of GSDG, DomainBed and the SWAD fork may be mixed, and may still be running.

python -m analysis RUNS...                    the tables
python -m analysis diff RUN RUN               what differs between two runs' configs
python -m analysis report RUNS... -o FOLDER   one HTML page: tables, curves, ablations, conflicts, provenance
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from gsdg.analysis.formats import FORMATS, Sheet, text
from gsdg.analysis.intervals import intervals, write_scores
from gsdg.analysis.read.frames import Runs, read_config, read_runs
from gsdg.analysis.read.run_folders import folders_of, ids_of
from gsdg.analysis.selection import METHODS
from gsdg.analysis.significance import ROPE, significance
from gsdg.analysis.statistics import ERRORS
from gsdg.analysis.tables import (
    Summary,
    chosen_runs,
    comparison,
    csv,
    differences,
    lines_below,
    overview,
    ranking,
    read_published,
    sheets,
    summary,
)
from gsdg.metrics import METRICS
from gsdg.utils.errors import UserError, listing
from gsdg.utils.terminal import closed_pipe_is_no_error
from gsdg.utils.text import align_columns, let_streams_print_any_text

NOTHING_TO_COMPARE = "no comparison with {}: it has no results yet, or no other method has\n"
NOTHING_TO_RANK = "--ranks: no ranks: they need two methods with results on the same targets"
NOT_IN_CSV = (
    "ranks",
    "chosen",
    "published",
    "significance",
    "intervals",
)  # options that do nothing with --format csv, which writes one table

HELP = {
    "run": "a run folder; or the id, or the beginning of the id, of a run in --runs-dir",
    "runs": "folders that contain run folders (runs_dir of a training), or run folders, or run ids",
    "--runs-dir": "where run ids are looked up (default: runs)",
    "--selection": f"how the step and the hyper-parameter draw are chosen, one or more of: {', '.join(METHODS)} "
    "(default: training_domain)",
    "--output": "where index.html is written (default: report)",
    "--metric": f"what is reported and what selections choose by, one of: {', '.join(METRICS)} (default: accuracy); "
    "runs record it if trainer.metrics lists it",
    "--format": "format of the tables (default: text)",
    "--ranks": "also print a table of average ranks",
    "--significance": "also show tests over all cells (data set, target): Friedman and Nemenyi for three or more "
    "methods, the Bayesian signed-rank test for two methods or against --baseline",
    "--rope": "half-width of the region in which the Bayesian test calls methods practically equivalent, in percentage "
    f"points or in the metric's unit (default: {ROPE:g})",
    "--intervals": "also show interquartile means with stratified-bootstrap intervals, and with --baseline the "
    "probability of improvement",
    "--rliable": "also write the values behind --intervals to this .npz file, which the library rliable reads",
    "--chosen": "also print the run, step and hyper-parameter draw behind every number",
    "--published": "show the paper's results beside the runs'",
    "--baseline": "also show paired differences to this method (with --format csv: only these): its name in the "
    "tables, or the name of its algorithm if only one method has it",
    "--draws": "runs that differ only in these config keys are hyper-parameter draws of one method, to select from",
    "--where": "only runs whose config has these values (several values of one key: any of them); keys as in the "
    "tables or in the configs",
    "--exclude": "leave out runs whose config has one of these values",
    "--error": "form of the standard error: population (DomainBed's) or sample (default: population)",
    "--unfinished": "also count runs that are not done, with the steps that they have recorded",
    "--runs": "only the runs with these ids",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, or 2 after an error message."""
    let_streams_print_any_text()
    with closed_pipe_is_no_error():
        try:
            command, options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
            command(options)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


def parse_arguments(arguments: Sequence[str]) -> tuple[Callable[[argparse.Namespace], None], argparse.Namespace]:
    """(the function that runs the command, its options)."""
    word = arguments[0] if arguments and arguments[0] in ("diff", "report") else ""
    command = {"": tables, "diff": diff, "report": page}[word]
    parser = argparse.ArgumentParser(
        prog=f"python -m analysis {word}".strip(),
        description=command.__doc__ if word else __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command_line=["python", "-m", "analysis", *arguments])
    if word == "diff":
        parser.add_argument("runs", nargs=2, metavar="RUN", help=HELP["run"])
    else:
        _add_options(parser, page_only=bool(word))
    parser.add_argument("--runs-dir", default="runs", metavar="FOLDER", help=HELP["--runs-dir"])
    options = parser.parse_args(arguments[bool(word) :])
    if getattr(options, "format", "") == "csv" and (unused := [name for name in NOT_IN_CSV if getattr(options, name)]):
        without = listing(f"--{name}" for name in unused)
        raise UserError(
            f"--format csv writes one table, without {without}. "
            f"Leave out {without}, or choose another format: {', '.join(FORMATS)}"
        )
    if getattr(options, "rope", None) is not None and not options.significance:
        raise UserError("--rope: only the Bayesian test has such a region. Add --significance, or leave out --rope.")
    if getattr(options, "published", False) and options.metric != "accuracy":
        raise UserError(f"--published: the paper has accuracies only, not {options.metric}. Leave out one of the two.")
    return command, options


def _add_options(parser: argparse.ArgumentParser, *, page_only: bool) -> None:
    """The arguments of the tables and of the page. `page_only`: without options that the page ignores."""

    def add(*names: str, **settings: Any) -> None:
        parser.add_argument(*names, help=HELP[names[-1]], **settings)

    add("runs", nargs="+", metavar="RUNS")
    add("--selection", nargs="+", choices=METHODS, default=["training_domain"], metavar="METHOD")
    add("--metric", choices=METRICS, default="accuracy", metavar="METRIC")
    if page_only:
        add("-o", "--output", default="report", metavar="FOLDER")
    else:
        add("--format", choices=[*FORMATS, "csv"], default="text")
        add("--ranks", action="store_true")
        add("--chosen", action="store_true")
        add("--rliable", metavar="FILE")
    add("--published", action="store_true")
    add("--baseline", metavar="METHOD")
    add("--significance", action="store_true")
    add("--rope", type=float, metavar="POINTS")
    add("--intervals", action="store_true")
    add("--draws", nargs="+", default=[], metavar="KEY")
    add("--where", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    add("--exclude", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    add("--error", choices=ERRORS, default="population")
    add("--unfinished", action="store_true")
    add("--runs", dest="ids", metavar="ID,ID")


# ---- the commands ---------------------------------------------------------------------------------------------------


def tables(options: argparse.Namespace) -> None:
    """Print the tables."""
    runs, results = _read(options)
    tests = _tests(results, options)
    if options.rliable:
        print(write_scores(options.rliable, results), file=sys.stderr)
    # Everything that is not a table goes to stderr, unless the format is text: a file of tables stays valid.
    if options.format == "csv":
        _print_csv(results, options.baseline)
        print(overview(runs, options.selection), file=sys.stderr)
        return
    shown = sheets(results, _published(results) if options.published else None)
    shown += _compared(results, options.baseline) if options.baseline else []
    ranks = ranking(results) if options.ranks else []
    if options.ranks and not ranks:
        print(NOTHING_TO_RANK, file=sys.stderr)
    shown += ranks + tests
    shown += chosen_runs(results, runs) if options.chosen else []
    if options.format == "text":
        blocks = [text(sheet, terminal=sys.stdout.isatty()) for sheet in shown]
        print("\n\n".join([*blocks, overview(runs, options.selection)]))
    else:
        print("\n\n".join(FORMATS[options.format](sheet) for sheet in shown))
        print(overview(runs, options.selection), file=sys.stderr)


def diff(options: argparse.Namespace) -> None:
    """Print the config keys in which two runs differ, and both values."""
    folders = folders_of(options.runs, options.runs_dir)
    configs = [read_config(folder) for folder in folders]
    keys = sorted({*configs[0], *configs[1]})
    different = [key for key in keys if configs[0].get(key) != configs[1].get(key)]
    table = [["", *folders], *([key, *(config.get(key, "unset") for config in configs)] for key in different)]
    print("\n".join(align_columns(table)) if different else "the configs are equal")


def page(options: argparse.Namespace) -> None:
    """Write FOLDER/index.html, one self-contained page with tables and figures."""
    from gsdg.analysis.report import write_page  # needs matplotlib

    runs, results = _read(options)
    published = _published(results) if options.published else None
    command = shlex.join(options.command_line)
    path = write_page(options.output, runs, results, published, options.baseline, command, _tests(results, options))
    print(f"written: {path}")


def _read(options: argparse.Namespace) -> tuple[Runs, Summary]:
    folders = folders_of(options.runs, options.runs_dir)
    run_ids = ids_of(options.ids.split(","), folders) if options.ids else None
    runs = read_runs(folders, run_ids, options.draws, options.where, options.exclude, options.metric)
    return runs, summary(runs, options.selection, error=options.error, unfinished=options.unfinished)


def _tests(results: Summary, options: argparse.Namespace) -> list[Sheet]:
    """The tables of --significance and --intervals. UserError if one of them cannot be computed."""
    shown = significance(results, options.baseline, options.rope) if options.significance else []
    return shown + (intervals(results, options.baseline) if options.intervals else [])


def _published(results: Summary) -> pd.DataFrame:
    """The paper's results. Data sets of the runs that the paper has no results for are named on stderr."""
    published, datasets = read_published(), dict.fromkeys(results.cells["dataset"])
    if lacking := [name for name in datasets if name not in set(published["dataset"])]:
        valid = listing(dict.fromkeys(published["dataset"]))
        print(f"--published: the paper has no results for {listing(lacking)}, only for {valid}", file=sys.stderr)
    return published


def _compared(results: Summary, baseline: str) -> list[Sheet]:
    """The comparisons with the baseline; a message on stderr if there are none."""
    compared = comparison(results, baseline)
    if not compared:
        print(NOTHING_TO_COMPARE.format(baseline), end="", file=sys.stderr)
    return compared


def _print_csv(results: Summary, baseline: str | None) -> None:
    """The numbers on stdout; notes and missing runs on stderr, where they do not disturb a CSV reader."""
    if baseline:
        rows = differences(results, baseline)
        print(rows.to_csv(index=False, float_format="%.6f"), end="")
        print(NOTHING_TO_COMPARE.format(baseline) if rows.empty else "", end="", file=sys.stderr)
    else:
        print(csv(results.cells), end="")
    for dataset, selection in results.cells[["dataset", "selection"]].drop_duplicates().itertuples(index=False):
        if lines := lines_below(results, dataset, selection):
            print("\n".join([f"{dataset}, {selection}", *lines]), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
