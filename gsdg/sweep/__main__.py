"""`python -m gsdg.sweep plan | status | cancel | retry | prepare`: sweeps on a cluster, from any login node.

Everything is read from the run folders and SLURM's queue; the process that launched a sweep is not needed.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from pathlib import Path
from typing import Any

from gsdg.config.command_line import refuse_flags
from gsdg.config.messages import explain
from gsdg.config.places import absolute_path
from gsdg.sweep import slurm
from gsdg.sweep.cancel import Cancellation
from gsdg.sweep.folder import FrozenRun, SweepFolder, filter_runs, find_sweep, owners
from gsdg.sweep.run_states import TO_SUBMIT, CachedStatusReader, RunState, run_states
from gsdg.utils.errors import UserError, listing
from gsdg.utils.terminal import closed_pipe_is_no_error
from gsdg.utils.text import let_streams_print_any_text

EXIT = "Exit status: 0 all runs are done; 3 some are running or pending; 1 none is, and some are not done."


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status. A UserError is printed to stderr, without a traceback."""
    let_streams_print_any_text()
    try:
        chosen = options(arguments)
        return chosen.command(chosen)
    except Exception as error:
        if not (message := explain(error)):
            raise
        print(message, file=sys.stderr)
        return 2


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The parsed command line. Positional words may follow options, which argparse alone does not allow.

    UserError for an unknown option.
    """
    words = sys.argv[1:] if arguments is None else arguments
    chosen, unparsed = parser().parse_known_args(words)
    flags = [word for word in unparsed if word.startswith("-")]
    refuse_flags(words[1:], flags, f"python -m gsdg.sweep {words[0]}")
    chosen.words += unparsed
    return chosen


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(prog="python -m gsdg.sweep", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="plan | status | cancel | retry | prepare")
    plan = _add_overrides_command(
        commands, "plan", _plan, "what a sweep would run, what of it is done, and what the rest will cost"
    )
    plan.add_argument("--all", action="store_true", help="list every run")
    status = _add_sweep_command(commands, "status", _status, "the states of a sweep's runs", EXIT)
    status.add_argument("--all", action="store_true", help="list every run")
    status.add_argument("--watch", action="store_true", help="show it again and again until no run is active")
    status.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between updates (default: 5)")
    cancel = _add_sweep_command(
        commands, "cancel", _cancel, "take runs out of the queue and stop those that are running; `retry` resumes them"
    )
    cancel.add_argument("--yes", action="store_true", help="do not ask for confirmation if no sweep is named")
    retry = _add_sweep_command(
        commands, "retry", _retry, "submit runs again with their frozen configs, from their last checkpoints"
    )
    retry.add_argument(
        "--resubmit", choices=TO_SUBMIT, default="failed", help="which runs (default: failed and missing)"
    )
    _add_overrides_command(
        commands, "prepare", _prepare, "download weights and build data caches, for jobs without internet"
    )
    return top


def _add_sweep_command(commands, name: str, function, text: str, epilog: str = "") -> argparse.ArgumentParser:
    """A command for a submitted sweep: its words name the sweep and filter its runs."""
    command = commands.add_parser(name, help=text, description=text, epilog=epilog)
    command.add_argument("words", nargs="*", metavar="SWEEP | key=value", help="part of a sweep's name (default: your "
                         "latest); which of its runs: split.target=sketch algorithm=erm")  # fmt: skip
    command.add_argument(
        "--runs-dir", type=folder, default=folder("runs"), help="where run folders are (default: runs)"
    )
    command.set_defaults(command=function)
    return command


def folder(text: str) -> Path:
    """The absolute path of a folder, because jobs work in another directory than the command."""
    return Path(absolute_path(text))


def _add_overrides_command(commands, name: str, function, text: str) -> argparse.ArgumentParser:
    """A command for a sweep that was not submitted: its words are the overrides of `python launch.py -m`."""
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("words", nargs="*", metavar="key=value", help="overrides, as of: python launch.py -m ...")
    command.add_argument("-cd", "--config-dir", type=folder, metavar="FOLDER", help="a folder with your own YAML files")
    command.add_argument("-m", "--multirun", action="store_true", help="accepted and ignored: this is always a sweep")
    command.set_defaults(command=function)
    return command


# ---- commands for submitted sweeps ----------------------------------------------------------------------------------


def _status(chosen: argparse.Namespace) -> int:
    from gsdg.sweep import status_text

    sweep, runs = chosen_runs(chosen)
    read = CachedStatusReader()

    def look() -> list[RunState]:
        return run_states(runs, sweep.runs_dir, queue(sweep.runs_dir), read)

    def draw(states: list[RunState]) -> str:
        return status_text.status(sweep, states, every=chosen.all)

    states, is_on_screen = None, False
    if chosen.watch:
        with contextlib.suppress(KeyboardInterrupt):
            states, is_on_screen = status_text.watch(look, draw, chosen.every, sys.stdout), sys.stdout.isatty()
    states = states or look()  # not watched, or interrupted
    if not is_on_screen:
        print(draw(states))
    return status_text.exit_status(states)


def _cancel(chosen: argparse.Namespace) -> int:
    sweep, runs = chosen_runs(chosen)
    cancellation = Cancellation(sweep, runs, queue(sweep.runs_dir))
    named = any("=" not in word for word in chosen.words)
    if cancellation.to_cancel and not (named or chosen.yes) and not _confirmed(chosen, cancellation):
        print("nothing was cancelled")
        return 1
    print("\n".join(cancellation.carry_out()))
    return 0


def _confirmed(chosen: argparse.Namespace, cancellation: Cancellation) -> bool:
    """Whether the user confirms to cancel the latest sweep. UserError where stdin is no terminal to ask at."""
    print(f"no sweep is named: the latest is {cancellation.describe()}")
    if sys.stdin.isatty():
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            return input("Cancel these runs? [y/N] ").strip().lower() in ("y", "yes")
        return False
    words = [cancellation.sweep.name, *chosen.words, "--runs-dir", str(chosen.runs_dir), "--yes"]
    raise UserError(
        "nothing was cancelled: no sweep is named, and there is no terminal to ask for confirmation.\n"
        f"To cancel these runs: {shlex.join(['python', '-m', 'gsdg.sweep', 'cancel', *words])}"
    )


def _retry(chosen: argparse.Namespace) -> int:
    from gsdg.sweep.submit import resubmit

    sweep, runs = chosen_runs(chosen)
    resubmit(sweep, runs, chosen.resubmit)
    return 0


def chosen_runs(chosen: argparse.Namespace) -> tuple[SweepFolder, list[FrozenRun]]:
    """The sweep that the command line names, and those of its runs that match the filters."""
    names = [word for word in chosen.words if "=" not in word]
    if len(names) > 1:
        raise UserError(f"several sweeps are named: {listing(names)}. Give one; filters are key=value.")
    sweep = find_sweep(chosen.runs_dir, names[0] if names else None)
    return sweep, filter_runs(sweep.runs(), [word for word in chosen.words if "=" in word])


def queue(runs_dir: Path) -> dict | None:
    """The tasks in SLURM's queue of all users who submitted from `runs_dir`.

    None where SLURM is absent or does not answer; the commands then show what is on disk.
    """
    try:
        return slurm.queue(owners=owners(runs_dir))
    except UserError:
        return None


# ---- commands for sweeps that are not submitted ---------------------------------------------------------------------


def _plan(chosen: argparse.Namespace) -> int:
    from gsdg.runs.provenance import code_state
    from gsdg.sweep import status_text
    from gsdg.sweep.earlier import runs_to_submit
    from gsdg.sweep.estimate import estimate

    runs, resubmit, launcher = enumerated(chosen.words, chosen.config_dir)
    runs_dir = Path(runs[0].config["runs_dir"])
    states = run_states(runs, runs_dir, queue(runs_dir))
    due = runs_to_submit(runs, states, resubmit, runs_dir, code_state([run.config for run in runs]))
    steps_done = [0 if resubmit == "all" or run.state == "done" else run.step for run in due]
    cost = estimate([run.config for run in due], runs_dir, steps_done)
    # How many tasks the launcher would submit, and how many runs would be executed at a time.
    runs_per_task, side_by_side = launcher.get("runs_per_task") or len(due), launcher.get("side_by_side", 1)
    tasks = -(-len(due) // max(1, runs_per_task))
    at_once = min(tasks, launcher.get("array_parallelism", 1)) * min(side_by_side, runs_per_task)
    print(
        status_text.plan(states, due, resubmit, tasks, cost, at_once, "GPU" if launcher.get("gpus_per_node") else "CPU")
    )
    if chosen.all:
        print("\n" + "\n".join(status_text.run_table(states, ("state", "reason"))))
    return 0


def _prepare(chosen: argparse.Namespace) -> int:
    from gsdg.sweep.prefetch import prefetch

    runs, _, _ = enumerated(chosen.words, chosen.config_dir)
    prefetch([run.config for run in runs])
    return 0


def enumerated(overrides: list[str], config_dir: Path | None = None) -> tuple[list[FrozenRun], str, dict[str, Any]]:
    """The runs of `python launch.py -m <overrides>`, its resubmit=..., and its launcher's parameters."""
    from gsdg.config.schema import as_dict
    from gsdg.sweep.compose import from_command_line
    from gsdg.sweep.enumerate_runs import freeze_runs

    composer, jobs, master = from_command_line(overrides, config_dir)
    first = composer.compose(jobs[0])
    launcher = as_dict(master.hydra.launcher, resolve=False)
    return freeze_runs(composer, jobs), "all" if first.force else first.resubmit, launcher


if __name__ == "__main__":
    with closed_pipe_is_no_error():
        sys.exit(main())
