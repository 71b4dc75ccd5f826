"""`python -m gsdg.runs list | show | remove`: which runs there are, how much disk space they use, and removing them.

`remove` only shows what it would remove, unless --yes is given. Runs that a live process writes, or that a submitted
task may still need, are kept. Once a run is removed, its sweep lists it as `missing`, and launching the sweep again
would train it again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gsdg.runs.describe import describe_run, format_megabytes, format_sizes, table
from gsdg.runs.in_use import Submissions
from gsdg.runs.inventory import (
    FoundRun,
    find_run,
    parse_duration,
    read_inventory,
    select_runs,
    size_of,
    total_sizes,
)
from gsdg.runs.removal import (
    finish_removals,
    no_launch,
    reason_to_keep,
    remove_folder,
    remove_runs,
    unneeded_code,
)
from gsdg.utils.errors import UserError, plural
from gsdg.utils.terminal import closed_pipe_is_no_error

SHOWN = 20  # runs that `remove` lists
REMOVED_WITH_RECORDS_KEPT = ("checkpoints", "weights")  # kinds of inventory.KINDS
RESUMABLE = ("stopped", "dead")  # states of runs that would resume from a checkpoint


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status. A UserError or OSError is printed without a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    options.arguments = arguments
    with closed_pipe_is_no_error():
        try:
            return options.command(options)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:
            raise
        except OSError as error:
            print(f"error: {error.strerror or error}: {error.filename or options.runs_dir}", file=sys.stderr)
            return 2
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m gsdg.runs", description=__doc__.partition("\n")[2].strip())
    commands = top.add_subparsers(required=True, metavar="list | show | remove")
    _command(commands, "list", list_runs, "list the runs, their states and their disk space")
    show = commands.add_parser("show", help="show all about one run", description="Show all about one run.")
    show.add_argument("run", help="its run id, or the beginning of it")
    show.set_defaults(command=show_run)
    remove = _command(commands, "remove", remove_selected, "show which runs would be removed, or remove them")
    remove.add_argument("--keep-records", action="store_true", help="remove checkpoints and weights only")
    remove.add_argument("--code", action="store_true", help="also remove copies of the code that no task needs")
    remove.add_argument("--yes", action="store_true", help="remove instead of only showing what would be removed")
    for command in commands.choices.values():
        command.add_argument(
            "--runs-dir", type=Path, default=Path("runs"), help="where run folders are (default: runs)"
        )
    return top


def _command(commands, name: str, function: Callable, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    which = "run ids or beginnings of them, and filters on configs such as split.target=sketch algorithm=erm"
    command.add_argument("words", nargs="*", metavar="RUN | key=value", help=which)
    command.add_argument("--older", metavar="TIME", help="only runs whose last heartbeat is older: 30d, 12h")
    command.add_argument("--failed", action="store_true", help="only runs that failed")
    command.set_defaults(command=function)
    return command


# ---- list and show ------------------------------------------------------------------------------------------------


def list_runs(options: argparse.Namespace) -> int:
    runs = _select(options, read_inventory(options.runs_dir))
    if runs:
        print("\n".join(table(runs)))
    print(f"{plural(len(runs), 'run')}, {format_sizes(total_sizes(run.sizes for run in runs))}")
    for name, content in {".code": "copies of the code, for the jobs of sweeps", ".sweeps": "sweeps"}.items():
        if size := size_of(options.runs_dir / name):
            print(f"in {options.runs_dir / name} ({content}): {format_megabytes(size)}")
    return 0


def show_run(options: argparse.Namespace) -> int:
    run = find_run(options.run, read_inventory(options.runs_dir))
    needed = reason_to_keep(run, Submissions(options.runs_dir)) or "by no process and no submitted task"
    print("\n".join(describe_run(run, needed)))
    return 0


# ---- remove -------------------------------------------------------------------------------------------------------


def remove_selected(options: argparse.Namespace) -> int:
    _check_selection_given(options)
    if not options.yes:
        _show_removal(options, *_plan_removal(options))
        return 0
    with no_launch(options.runs_dir):
        finish_removals(options.runs_dir)
        runs, kept, code = _plan_removal(options)
        sizes = {run.run_id: run.sizes for run in runs}  # of what is about to be removed
        remaining = remove_runs(runs, keep_records=options.keep_records)
        for path in code:
            remove_folder(path)
    removed = sizes.keys() - {run.run_id for run, _ in remaining}
    print(f"removed: {_describe_removal([sizes[run_id] for run_id in removed], code, options)}")
    _print_runs("kept", kept)
    _print_runs("could not be removed", remaining)
    return int(bool(remaining))


def _check_selection_given(options: argparse.Namespace) -> None:
    """UserError for `remove --yes` without a selection, which would remove every run."""
    if not (options.words or options.older or options.failed or options.code):
        raise UserError(
            "which runs? Select what to remove: run ids, key=value, --older 30d, --failed, or --code.\n"
            f"To list the runs: python -m gsdg.runs list --runs-dir {shlex.quote(str(options.runs_dir))}"
        )


def _plan_removal(options: argparse.Namespace) -> tuple[list[FoundRun], list[tuple[FoundRun, str]], dict[Path, int]]:
    """(runs to remove, (run, reason) of those to keep, {copy of the code to remove: bytes})."""
    inventory, submissions = read_inventory(options.runs_dir), Submissions(options.runs_dir)
    selects_runs = options.words or options.older or options.failed
    selected = _select(options, inventory) if selects_runs else []
    reasons = [(run, reason_to_keep(run, submissions)) for run in selected]
    runs = [run for run, reason in reasons if not reason and (_has_weights(run) or not options.keep_records)]
    code = unneeded_code(options.runs_dir, submissions) if options.code else []
    return runs, [(run, reason) for run, reason in reasons if reason], {path: size_of(path) for path in code}


def _show_removal(
    options: argparse.Namespace, runs: list[FoundRun], kept: list[tuple[FoundRun, str]], code: dict[Path, int]
) -> None:
    print(f"to remove: {_describe_removal([run.sizes for run in runs], code, options)}")
    for line in table(runs)[: SHOWN + 1] if runs else []:
        print(f"  {line}")
    if len(runs) > SHOWN:
        print(f"  and {len(runs) - SHOWN} more")
    resumable = sum(run.state in RESUMABLE for run in runs)
    if resumable:
        print(f"note: {plural(resumable, 'run')} of these could be resumed; without checkpoints they start from step 0")
    _print_runs("kept", kept)
    if runs or code:
        command = shlex.join(["python", "-m", "gsdg.runs", *options.arguments, "--yes"])
        print(f"Nothing is removed yet. To remove it: {command}")


def _select(options: argparse.Namespace, runs: list[FoundRun]) -> list[FoundRun]:
    older = None if options.older is None else parse_duration(options.older)
    return select_runs(runs, options.words, older=older, failed=options.failed)


def _has_weights(run: FoundRun) -> bool:
    """Whether there is anything that --keep-records would remove."""
    return bool(run.sizes["checkpoints"] or run.sizes["weights"])


def _describe_removal(runs: list[dict[str, int]], code: dict[Path, int], options: argparse.Namespace) -> str:
    """`2 runs and 1 copy of the code (0.4 MB), of 133.0 MB: checkpoints 0.0 MB, ...`. runs: {kind: bytes} of each."""
    text = "checkpoints and weights of " if options.keep_records else ""
    text += plural(len(runs), "run")
    if code:
        copies = "copy" if len(code) == 1 else "copies"
        text += f" and {len(code)} {copies} of the code ({format_megabytes(sum(code.values()))})"
    if runs:
        sizes = total_sizes(runs)
        kinds = REMOVED_WITH_RECORDS_KEPT if options.keep_records else tuple(sizes)
        text += f", of {format_sizes({kind: sizes[kind] for kind in kinds})}"
    return text


def _print_runs(title: str, runs: Sequence[tuple[FoundRun, str]]) -> None:
    """Print one line per (run, reason), up to SHOWN lines."""
    if runs:
        print(f"{title}: {plural(len(runs), 'run')}")
    for run, reason in runs[:SHOWN]:
        print(f"  {run.run_id}  {reason}")
    if len(runs) > SHOWN:
        print(f"  and {len(runs) - SHOWN} more")


if __name__ == "__main__":
    sys.exit(main())
