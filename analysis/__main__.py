"""The tables of run folders on disk, of ours, DomainBed's and the SWAD fork's runs together, while they still run too.

python -m analysis RUNS...                    the tables
python -m analysis diff RUN RUN               what differs between two runs' configs
python -m analysis report RUNS... -o FOLDER   one HTML page: tables, curves, ablations, conflicts, provenance
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence

from analysis.formats import FORMATS, Sheet, text
from analysis.frames import Runs, read_config, read_runs
from analysis.selection import METHODS
from analysis.statistics import ERRORS
from analysis.tables import (
    Summary,
    account,
    chosen_runs,
    comparison,
    csv,
    differences,
    lines_below,
    ranking,
    read_published,
    sheets,
    summary,
)
from gsdg.errors import UserError

DRAWS = "runs that differ in these config keys only are hyper-parameter draws of one method, to select from"
BASELINE = (
    "paired differences to this method too (csv: instead): its name in the tables, or its algorithm's if one has it"
)
WHERE = "only runs whose config has these values (of one key any of them), keys as the tables or configs write them"
EXCLUDE = "without runs whose config has one of these values"
NOTHING_TO_COMPARE = "no comparison with {}: it has no results yet, or no other method has\n"
SELECTION = f"how step and draw are chosen, one or more of: {', '.join(METHODS)} (default: training_domain)"


def main(arguments: list[str] | None = None) -> int:
    try:
        command, options = parsed(sys.argv[1:] if arguments is None else arguments)
        command(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def parsed(arguments: Sequence[str]) -> tuple[Callable[[argparse.Namespace], None], argparse.Namespace]:
    """What is to be done, and with which options."""
    word = arguments[0] if arguments and arguments[0] in ("diff", "report") else ""
    command = {"": tables, "diff": diff, "report": page}[word]
    parser = argparse.ArgumentParser(
        prog=f"python -m analysis {word}".strip(),
        description=command.__doc__ if word else __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command_line=["python", "-m", "analysis", *arguments])
    if word == "diff":
        parser.add_argument("runs", nargs=2, metavar="RUN", help="a run's folder")
    else:
        _add_options(parser, page_only=bool(word))
    return command, parser.parse_args(arguments[bool(word) :])


def tables(options: argparse.Namespace) -> None:
    """Print the tables."""
    runs, found = _read(options)
    if options.format == "csv":
        _print_csv(found, options.baseline)
        print(account(runs, options.selection), file=sys.stderr)
        return
    made = sheets(found, read_published() if options.published else None)
    made += _compared(found, options.baseline) if options.baseline else []
    made += ranking(found) if options.ranks else []
    made += chosen_runs(found, runs) if options.chosen else []
    if options.format == "text":
        shown = [text(sheet, terminal=sys.stdout.isatty()) for sheet in made]
        print("\n\n".join([*shown, account(runs, options.selection)]))
    else:
        print("\n\n".join(FORMATS[options.format](sheet) for sheet in made))
        print(account(runs, options.selection), file=sys.stderr)


def diff(options: argparse.Namespace) -> None:
    """Print the keys in which two runs' configs differ, and both values."""
    folders = options.runs
    configs = [read_config(folder) for folder in folders]
    keys = sorted({*configs[0], *configs[1]})
    different = [key for key in keys if configs[0].get(key) != configs[1].get(key)]
    table = [["", *folders], *([key, *(config.get(key, "unset") for config in configs)] for key in different)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table if different else [["the configs are equal"]]:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=False)).rstrip())


def page(options: argparse.Namespace) -> None:
    """Write a page that needs nothing but itself: FOLDER/index.html."""
    from analysis.report import write_page  # needs matplotlib

    runs, found = _read(options)
    published = read_published() if options.published else None
    command = shlex.join(options.command_line)
    print(f"written: {write_page(options.output, runs, found, published, options.baseline, command)}")


def _read(options: argparse.Namespace) -> tuple[Runs, Summary]:
    run_ids = options.ids.split(",") if options.ids else None
    runs = read_runs(options.runs, run_ids, options.draws, options.where, options.exclude)
    return runs, summary(runs, options.selection, error=options.error, unfinished=options.unfinished)


def _compared(found: Summary, baseline: str) -> list[Sheet]:
    made = comparison(found, baseline)
    if not made:
        print(NOTHING_TO_COMPARE.format(baseline), end="", file=sys.stderr)
    return made


def _print_csv(found: Summary, baseline: str | None) -> None:
    """The numbers on stdout; what is missing on stderr, where it does not break a reader."""
    if baseline:
        rows = differences(found, baseline)
        print(rows.to_csv(index=False, float_format="%.6f"), end="")
        print(NOTHING_TO_COMPARE.format(baseline) if rows.empty else "", end="", file=sys.stderr)
    else:
        print(csv(found.cells), end="")
    for dataset, selection in found.cells[["dataset", "selection"]].drop_duplicates().itertuples(index=False):
        if lines := lines_below(found, dataset, selection):
            print("\n".join([f"{dataset}, {selection}", *lines]), file=sys.stderr)


def _add_options(parser: argparse.ArgumentParser, *, page_only: bool) -> None:
    add = parser.add_argument
    add(
        "runs", nargs="+", metavar="RUNS", help="folders that hold run folders (runs_dir of a training), or run folders"
    )
    add("--selection", nargs="+", choices=METHODS, default=["training_domain"], metavar="METHOD", help=SELECTION)
    if page_only:
        add("-o", "--output", default="report", metavar="FOLDER", help="default: report")
    else:
        add("--format", choices=[*FORMATS, "csv"], default="text")
        add("--ranks", action="store_true", help="a table of average ranks too")
        add("--chosen", action="store_true", help="the run, step and hyper-parameter draw behind every number too")
    add("--published", action="store_true", help="the paper's figures beside the runs'")
    add("--baseline", metavar="METHOD", help=BASELINE)
    add("--draws", nargs="+", default=[], metavar="KEY", help=DRAWS)
    for option, which in {"--where": WHERE, "--exclude": EXCLUDE}.items():
        add(option, nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=which)
    add("--error", choices=ERRORS, default="population", help="of the standard error: DomainBed's form or the sample's")
    add("--unfinished", action="store_true", help="count runs that are not done too, with what they have recorded")
    add("--runs", dest="ids", metavar="ID,ID", help="only these runs")


if __name__ == "__main__":
    sys.exit(main())
