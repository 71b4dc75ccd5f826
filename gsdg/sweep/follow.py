"""Output of `hydra/launcher=local` while it waits: one line whenever a run of the sweep starts or ends. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gsdg.sweep.folder import FrozenRun
from gsdg.sweep.run_states import read_statuses
from gsdg.utils import terminal
from gsdg.utils.errors import listing
from gsdg.utils.progress import Progress

EVERY = 1.0  # seconds between reads of the runs' status.json


def follow(runs: Sequence[FrozenRun], runs_dir: Path, ended: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Print a line for each run whose state changes, until the jobs have ended.

    A line is `[3/12] run 4f2d99ea7668, target photo, erm: done`. A terminal also shows a bar of the runs that ended.

    Args:
        ended: whether all jobs have ended.
        say: prints a line.
    """
    before = _states(runs, runs_dir)  # these are the results of earlier submissions, which are not printed
    with Progress("sweep", len(runs), "runs", bar_only=True) as progress:
        over = False
        while not over:
            over = ended()  # asked before the states are read, so that the last changes are printed too
            now = _states(runs, runs_dir)
            for number, run in enumerate(runs, 1):
                if now[run.run_id] != before[run.run_id]:
                    terminal.erase()
                    say(f"[{number}/{len(runs)}] {described(run)}: {_with_reason(now[run.run_id])}")
            before = now
            progress.add(sum(state[0] in ("done", "failed", "stopped") for state in now.values()) - progress.done)
            if not over:
                time.sleep(EVERY)


def described(run: FrozenRun) -> str:
    """`run 4f2d99ea7668, target photo, erm`."""
    return f"run {run.run_id}, target {listing(run.config['split']['target'])}, {run.config['algorithm']['name']}"


def _states(runs: Sequence[FrozenRun], runs_dir: Path) -> dict[str, tuple]:
    """{run id: (state, reason, submission)}."""
    statuses = read_statuses(runs_dir, [run.run_id for run in runs])
    return {
        run_id: (status.get("state"), status.get("reason"), status.get("submission"))
        for run_id, status in statuses.items()
    }


def _with_reason(state: tuple) -> str:
    name, reason, _ = state
    return f"{name}: {reason}" if reason else str(name)
