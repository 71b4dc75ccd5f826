"""What was ever submitted and cancelled from a runs_dir, by any of its sweeps, and what of it SLURM's queue holds.

Sweeps that overlap share runs, so what counts for a run is its last submission by any of them. Standard library only.
"""

from __future__ import annotations

import socket
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gsdg.runs import RunFolder, process_start
from gsdg.sweep import slurm
from gsdg.sweep.folder import SweepFolder, all_sweeps

ACCEPTED_WITHIN = 60.0  # seconds that sbatch may take: until then a submission without a job number is on its way
SILENT = "SLURM does not answer"


@dataclass(frozen=True)
class Submitted:
    """A submitted task: the runs of its pack, in order. job: None where SLURM has not given it a number."""

    sweep: SweepFolder
    cluster: str
    array: str
    index: int
    runs: tuple[str, ...]
    submitted: float  # unix seconds
    job: str | None
    host: str | None

    @property
    def key(self) -> tuple[str, int]:
        """Its name and index in SLURM's queue."""
        return self.array, self.index

    def has_process_here(self) -> bool:
        """Of a task without SLURM: whether its process is alive. The sweep's name is in its command line."""
        if process_start(int(self.job)) is None:
            return False
        try:
            return self.sweep.name.encode() in Path(f"/proc/{self.job}/cmdline").read_bytes()
        except OSError:
            return True  # a system that does not tell: the number alone must do


class History:
    """All that was submitted and cancelled from a runs_dir, and what of it SLURM's queue holds."""

    def __init__(self, runs_dir: Path, queue: dict | None) -> None:
        self.runs_dir, self.queue, self.now = Path(runs_dir), queue, time.time()
        self._tasks: dict[str, list[Submitted]] = defaultdict(list)  # of each run, oldest first
        self._cancelled: dict[str, float] = {}
        self._alive = cache(self._has_process)
        self.last_words = cache(slurm.last_words)  # the runs of a pack share their log
        for sweep in all_sweeps(runs_dir):
            self._read(sweep)
        for tasks in self._tasks.values():
            tasks.sort(key=lambda task: task.submitted)

    def _read(self, sweep: SweepFolder) -> None:
        events = sweep.events()
        accepted = {event["array"]: event for event in events if event["event"] == "accepted"}
        for event in events:
            if event["event"] == "submitted":
                for task in _tasks(sweep, event, accepted.get(event["array"])):
                    for run_id in task.runs:
                        self._tasks[run_id].append(task)
            elif event["event"] == "cancelled":
                for run_id in event["runs"]:
                    self._cancelled[run_id] = max(event["time"], self._cancelled.get(run_id, 0.0))

    def task(self, run_id: str) -> Submitted | None:
        """The task that has or had this run: the last that SLURM still holds, else the last of all."""
        tasks = self._tasks.get(run_id, [])
        held = [task for task in tasks if self.holds(task)]
        return (held or tasks or [None])[-1]

    def holding(self, run_ids: Iterable[str]) -> list[Submitted]:
        """Every task in the queue, or alive without SLURM, that has one of these runs; each once."""
        tasks = (task for run_id in run_ids for task in self._tasks.get(run_id, []))
        return [task for task in {(task.sweep.name, *task.key): task for task in tasks}.values() if self.holds(task)]

    def holds(self, task: Submitted) -> bool:
        """Whether it is still to come or at work, for all that can be known."""
        return self._alive(task) if task.cluster == "local" else task.key in (self.queue or {})

    def _has_process(self, task: Submitted) -> bool:
        if task.host == socket.gethostname():
            return task.has_process_here()
        return any(RunFolder(self.runs_dir / run_id).is_live() for run_id in task.runs)  # one beats: it goes on

    def cancelled(self, run_id: str, task: Submitted | None) -> bool:
        """Whether the run was cancelled after it was last submitted."""
        return run_id in self._cancelled and (task is None or self._cancelled[run_id] >= task.submitted)

    def wait(self, task: Submitted, run_id: str) -> str | None:
        """Why a run of this task has not begun; None where the task is over."""
        if self.holds(task):
            queued = None if task.cluster == "local" else self.queue[task.key]
            if queued is None or queued.state == "RUNNING":
                return "starting" if task.runs[0] == run_id else "waits its turn in its task"
            return f"{queued.state} ({queued.reason})" if queued.reason else queued.state
        if task.cluster != "local" and self.queue is None:
            return SILENT
        on_its_way = task.job is None and self.now - task.submitted < ACCEPTED_WITHIN
        return "being submitted" if on_its_way else None


def _tasks(sweep: SweepFolder, event: dict, accepted: dict | None) -> list[Submitted]:
    jobs = (accepted or {}).get("jobs") or [None] * len(event["packs"])
    where = {"cluster": event["cluster"], "array": event["array"], "submitted": event["time"]}
    host = (accepted or {}).get("host")
    return [
        Submitted(sweep, index=index, runs=tuple(pack), job=job and str(job), host=host, **where)
        for index, (pack, job) in enumerate(zip(event["packs"], jobs, strict=True))
    ]
