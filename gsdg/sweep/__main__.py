"""`python -m gsdg.sweep plan | status | cancel | retry | prepare`: sweeps on a cluster, from any login node.

Everything is read from the run folders and SLURM's queue: the process that launched a sweep is not needed any more.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from pathlib import Path

from gsdg.errors import UserError, explain, listing, plural
from gsdg.sweep import slurm
from gsdg.sweep.folder import Frozen, SweepFolder, find, matching, owners
from gsdg.sweep.history import SILENT, History, Submitted
from gsdg.sweep.states import TO_COME, TO_SUBMIT, Standing, stand, stand_in, states_in

EXIT = "Exit status: 0 every run is done; 3 some run or wait; 1 none runs or waits, and some are not done."


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit status. A mistake of the user's is printed to stderr, without a traceback."""
    chosen = options(arguments)
    try:
        return chosen.command(chosen)
    except Exception as error:
        if not (message := explain(error)):
            raise
        print(message, file=sys.stderr)
        return 2


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, read; words may follow options, which argparse alone does not allow."""
    chosen, more = parser().parse_known_args(arguments)
    if dashed := [word for word in more if word.startswith("-")]:
        parser().error(f"unrecognized: {listing(dashed)}")
    chosen.words += more
    return chosen


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m gsdg.sweep", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="plan | status | cancel | retry | prepare")
    one = _of_overrides(commands, "plan", _plan, "what a sweep would run, what of it is done, what the rest will cost")
    one.add_argument("--all", action="store_true", help="list every run")
    one = _of_sweep(commands, "status", _status, "how the runs of a sweep stand", EXIT)
    one.add_argument("--all", action="store_true", help="list every run")
    one.add_argument("--watch", nargs="?", type=float, const=5.0, metavar="SECONDS", help="until the end (every 5 s)")
    _of_sweep(commands, "cancel", _cancel, "take runs out of the queue and stop those that run; `retry` resumes them")
    one = _of_sweep(commands, "retry", _retry, "submit runs again, as they were frozen, from their last checkpoints")
    one.add_argument("--resubmit", choices=TO_SUBMIT, default="failed", help="which ones (default: failed and missing)")
    _of_overrides(commands, "prepare", _prepare, "fetch weights and build data caches, for jobs without internet")
    return top


def _of_sweep(commands, name: str, function, text: str, epilog: str = "") -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, epilog=epilog)
    command.add_argument("words", nargs="*", metavar="SWEEP | key=value", help="part of a sweep's name (default: the "
                         "latest); which of its runs: split.target=sketch algorithm=erm")  # fmt: skip
    command.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where run folders are (default: runs)")
    command.set_defaults(command=function)
    return command


def _of_overrides(commands, name: str, function, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("words", nargs="*", metavar="key=value", help="as those of: python launch.py -m ...")
    command.add_argument("-m", "--multirun", action="store_true", help="changes nothing: it is always a sweep")
    command.set_defaults(command=function)
    return command


# ---- sweeps that were submitted -----------------------------------------------------------------------------------


def _status(chosen: argparse.Namespace) -> int:
    from gsdg.sweep import table

    sweep, runs = chosen_runs(chosen)

    def look() -> list[Standing]:
        return stand(runs, sweep.runs_dir, queue(sweep.runs_dir))

    def draw(found: list[Standing]) -> str:
        return table.status(sweep, found, every=chosen.all)

    found, shown = None, False
    if chosen.watch is not None:
        with contextlib.suppress(KeyboardInterrupt):
            found, shown = table.watch(look, draw, chosen.watch, sys.stdout), sys.stdout.isatty()
    found = found or look()
    if not shown:
        print(draw(found))
    return table.exit_status(found)


def _cancel(chosen: argparse.Namespace) -> int:
    sweep, runs = chosen_runs(chosen)
    held = queue(sweep.runs_dir)
    history = History(sweep.runs_dir, held)
    found = [one for one in stand_in(history, runs) if one.state in (*TO_COME, "cancelled")]
    tasks = history.holding(one.run_id for one in found)
    ending = [one for one in found if one.state != "cancelled" and is_ours(one, history, tasks)]
    for owner in {history.task(one.run_id).sweep.path for one in ending}:
        SweepFolder(owner).append("cancelled", runs=[one.run_id for one in ending])
    states = listing(f"{count} {state}" for state, count in Counter(one.state for one in ending).items())
    print(f"sweep {sweep.name}: {len(ending)} of {plural(len(runs), 'run')} cancelled" + f" ({states})" * bool(ending))
    for one in found:
        if one.state == "running" and one not in ending:
            print(f"left alone: run {one.run_id} works on {one.host}, but in no task that SLURM has from a sweep")
    withdraw(tasks, History(sweep.runs_dir, held))
    if held is None and ending:
        print(f"{SILENT}: what runs stops by itself, what waits stays. Cancel again when SLURM is back.")
    return 0


def is_ours(one: Standing, history: History, tasks: list[Submitted]) -> bool:
    """Whether the run is a submitted task's: one of these, or one that cannot be seen from here."""
    task = history.task(one.run_id)
    unseen = task is not None and (history.queue is None or task.cluster == "local" or one.state == "pending")
    return unseen or any(one.run_id in task.runs for task in tasks)


def withdraw(tasks: list[Submitted], history: History) -> None:
    """scancel the tasks that have nothing else to do; the others see for themselves what was cancelled."""
    states = states_in(history, (run_id for task in tasks for run_id in task.runs))
    to_come = {run_id for run_id, state in states.items() if state in TO_COME}
    busy = {run_id for run_id in to_come if not history.cancelled(run_id, history.task(run_id))}
    idle = [task for task in tasks if task.cluster == "slurm" and busy.isdisjoint(task.runs)]
    if idle:
        slurm.cancel([history.queue[task.key].job for task in idle])
        print(f"{plural(len(idle), 'task')} taken from SLURM")
    if len(tasks) > len(idle):
        print(f"{plural(len(tasks) - len(idle), 'task')} left to stop the cancelled runs, which takes seconds")


def _retry(chosen: argparse.Namespace) -> int:
    from gsdg.sweep.submit import resubmit

    sweep, runs = chosen_runs(chosen)
    resubmit(sweep, runs, chosen.resubmit)
    return 0


def chosen_runs(chosen: argparse.Namespace) -> tuple[SweepFolder, list[Frozen]]:
    """The sweep and its runs that the command line names."""
    names = [word for word in chosen.words if "=" not in word]
    if len(names) > 1:
        raise UserError(f"several sweeps are named: {listing(names)}. Give one; filters are key=value.")
    sweep = find(chosen.runs_dir, names[0] if names else None)
    return sweep, matching(sweep.runs(), [word for word in chosen.words if "=" in word])


def queue(runs_dir: Path) -> dict | None:
    """What SLURM has of those who submitted from `runs_dir`.

    None where there is no SLURM or it does not answer: what is on disk is shown all the same.
    """
    try:
        return slurm.queue(owners=owners(runs_dir))
    except UserError:
        return None


# ---- sweeps that are only overrides so far --------------------------------------------------------------------------


def _plan(chosen: argparse.Namespace) -> int:
    from gsdg.environment import code_state
    from gsdg.sweep import table
    from gsdg.sweep.earlier import due as to_submit
    from gsdg.sweep.estimate import estimate

    runs, resubmit, launcher = enumerated(chosen.words)
    runs_dir = Path(runs[0].config["runs_dir"])
    found = stand(runs, runs_dir, queue(runs_dir))
    due = to_submit(runs, found, resubmit, runs_dir, code_state([run.config for run in runs]))
    begun = [0 if resubmit == "all" or one.state == "done" else one.step for one in due]
    cost = estimate([one.config for one in due], runs_dir, begun)
    size, side = launcher.get("runs_per_task") or len(due), launcher.get("side_by_side", 1)
    tasks = -(-len(due) // max(1, size))
    at_once = min(tasks, launcher.get("array_parallelism", 1)) * min(side, size)
    print(table.plan(found, due, resubmit, tasks, cost, at_once, "GPU" if launcher.get("gpus_per_node") else "CPU"))
    if chosen.all:
        print("\n" + "\n".join(table.rows(found, ("state", "reason"))))
    return 0


def _prepare(chosen: argparse.Namespace) -> int:
    from gsdg.sweep.prepare import prepare

    runs, _, _ = enumerated(chosen.words)
    prepare([run.config for run in runs])
    return 0


def enumerated(overrides: list[str]) -> tuple[list[Frozen], str, dict]:
    """What `python launch.py -m <overrides>` would run, its resubmit=..., and its launcher's parameters."""
    from omegaconf import OmegaConf

    from gsdg.sweep.freeze import frozen
    from gsdg.sweep.grid import from_command_line

    composer, jobs, master = from_command_line(overrides)
    first, launcher = composer.compose(jobs[0]), OmegaConf.to_container(master.hydra.launcher)
    return frozen(composer, jobs), "all" if first.force else first.resubmit, launcher


if __name__ == "__main__":
    sys.exit(main())
