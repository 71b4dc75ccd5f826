"""All submissions and cancellations of a runs_dir, by all of its sweeps, matched with the tasks in SLURM's queue.

Sweeps may share runs, so a run's state follows from its last submission by any sweep. Which submission is the last, and
whether it was cancelled, is decided by the order of events and never by their times, because the clocks of hosts
differ. A task is recognised in the queue by its job number and by its batch script. Standard library only.
"""

from __future__ import annotations

import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gsdg.runs.batch_script import array_of
from gsdg.runs.folder import RunFolder, process_start
from gsdg.sweep import failure, slurm
from gsdg.sweep.folder import SweepFolder, all_sweeps
from gsdg.sweep.slurm import QueuedTask

ACCEPTED_WITHIN = 60.0  # seconds that sbatch may take: until then a task without a job number is "being submitted"
NO_ANSWER = "SLURM does not answer"


@dataclass(frozen=True)
class SubmittedTask:
    """One submitted task, which works on one pack of runs.

    Args:
        sweep: the sweep that submitted the task.
        cluster: `slurm` or `local`.
        array: name of the job array that the task is an element of.
        index: index of the task in its array.
        runs: the ids of the pack's runs, in order.
        submitted: unix seconds on the clock of the submitting host: for display, not for comparisons.
        order: number of the submission among all submissions from the runs_dir; 0 where none was noted.
        job: SLURM's job number, or the process id without SLURM; None where it was not noted.
        host: the submitting host; None where it was not noted.
        done_before: the runs that were done before the submission, and that the task runs again from scratch.
    """

    sweep: SweepFolder
    cluster: str
    array: str
    index: int
    runs: tuple[str, ...]
    submitted: float
    order: int
    job: str | None
    host: str | None
    done_before: frozenset[str] = frozenset()

    def has_process_here(self) -> bool:
        """For a task without SLURM: whether its process is alive on this host.

        The command line of the process contains the sweep's name, which tells it from a later process with its number.
        """
        if self.job is None or process_start(int(self.job)) is None:
            return False
        try:
            return self.sweep.name.encode() in Path(f"/proc/{self.job}/cmdline").read_bytes()
        except OSError:
            return True  # an operating system without /proc: only the number can be compared


class History:
    """All submissions and cancellations of a runs_dir, and SLURM's queue.

    Args:
        queue: the result of `slurm.queue()`; None where SLURM is absent or does not answer.
    """

    def __init__(self, runs_dir: Path, queue: dict | None) -> None:
        self.runs_dir, self.queue, self.now = Path(runs_dir), queue, time.time()
        self._tasks: dict[str, list[SubmittedTask]] = defaultdict(list)  # {run id: its tasks, oldest first}
        self._arrays: list[tuple[int, float, str]] = []  # (order, time, name) of every array
        self._cancelled: dict[str, set[str]] = defaultdict(set)  # {run id: the arrays that it was cancelled in}
        self._failed: dict[tuple[str, str], str] = {}  # {(run id, array): reason}, from the sweeps' events
        self._has_live_process = cache(self._find_live_process)
        self.termination_reason = cache(slurm.termination_reason)  # cached, because the runs of a pack share one log
        for sweep in all_sweeps(runs_dir):
            self._read(sweep)
        self._arrays.sort()
        self._position = {array: position for position, (*_, array) in enumerate(self._arrays)}
        for tasks in self._tasks.values():
            tasks.sort(key=lambda task: self._position[task.array])

    # ---- reading ------------------------------------------------------------------------------------------------

    def _read(self, sweep: SweepFolder) -> None:
        """Add the events of one sweep, in file order."""
        events = sweep.events()
        self._failed |= failure.failures(events)
        accepted = {event["array"]: event for event in events if event["event"] == "accepted"}
        # SLURM may use a job number twice, when its controller was killed before it saved the number.
        last_array = {job: event["array"] for event in accepted.values() for job in event["jobs"]}
        arrays_so_far: dict[str, list[str]] = defaultdict(list)  # {run id: the arrays of this sweep with the run}
        for event in events:
            if event["event"] == "submitted":
                self._arrays.append((event.get("order", 0), event["time"], event["array"]))
                for task in self._tasks_of(sweep, event, accepted.get(event["array"], {}), last_array):
                    for run_id in task.runs:
                        self._tasks[run_id].append(task)
                        arrays_so_far[run_id].append(task.array)
            elif event["event"] == "cancelled":
                for run_id in event["runs"]:
                    self._cancelled[run_id] |= set(arrays_so_far[run_id])

    def _tasks_of(
        self, sweep: SweepFolder, event: dict, accepted: dict, last_array: dict[str, str]
    ) -> Iterator[SubmittedTask]:
        """The tasks of one `submitted` event.

        Args:
            accepted: the `accepted` event of the same array; {} where none was noted.
            last_array: {job number: the last array of the sweep that was accepted with this number}.
        """
        jobs = {index: job for index, job in enumerate(accepted.get("jobs", ())) if last_array[job] == event["array"]}
        if not accepted and event["cluster"] == "slurm":  # the launching process died before it noted the numbers
            jobs = jobs_of(sweep, event["array"], self.queue or {})
        all_runs = (run_id for pack in event["packs"] for run_id in pack)
        done_before = frozenset(event.get("done_before", all_runs))
        for index, pack in enumerate(event["packs"]):
            yield SubmittedTask(
                sweep,
                cluster=event["cluster"],
                array=event["array"],
                index=index,
                runs=tuple(pack),
                submitted=event["time"],
                order=event.get("order", 0),
                job=str(jobs[index]) if index in jobs else None,
                host=accepted.get("host"),
                done_before=done_before,
            )

    # ---- submissions --------------------------------------------------------------------------------------------

    @property
    def next_order(self) -> int:
        """The order of the next submission. The caller holds `submit.launch_lock`, or two launches get the same."""
        return max((order for order, *_ in self._arrays), default=0) + 1

    def task(self, run_id: str) -> SubmittedTask | None:
        """The last active task that has this run, else the last task that had it; None if it was never submitted."""
        tasks = self._tasks.get(run_id, [])
        active = [task for task in tasks if self.is_active(task)]
        return (active or tasks or [None])[-1]

    def is_not_older(self, array: str | None, task: SubmittedTask) -> bool:
        """Whether `array`, the submission that a status.json names, is the task's submission or a later one."""
        return self._position.get(array, -1) >= self._position[task.array]

    def is_cancelled(self, run_id: str, task: SubmittedTask | None) -> bool:
        """Whether the run was cancelled after `task`, its last task, was submitted."""
        return run_id in self._cancelled and (task is None or task.array in self._cancelled[run_id])

    def failure_reason(self, run_id: str, task: SubmittedTask | None) -> str | None:
        """Why the run failed in this task, where this could not be written into the run's own folder; else None."""
        return self._failed.get((run_id, task.array)) if task else None

    # ---- tasks that are queued or at work -----------------------------------------------------------------------

    def active_tasks(self, run_ids: Iterable[str]) -> list[SubmittedTask]:
        """Every active task that has at least one of these runs, each task once."""
        tasks = (task for run_id in run_ids for task in self._tasks.get(run_id, []))
        distinct = {(task.array, task.index): task for task in tasks}
        return [task for task in distinct.values() if self.is_active(task)]

    def is_active(self, task: SubmittedTask) -> bool:
        """Whether the task is in SLURM's queue, or its process is alive (as far as this host can see)."""
        return self._has_live_process(task) if task.cluster == "local" else self.queue_entry(task) is not None

    def queue_entry(self, task: SubmittedTask) -> QueuedTask | None:
        """The task's entry in SLURM's queue.

        An entry with the task's number but another batch script is a different job: SLURM may use a number twice.
        """
        entry = (self.queue or {}).get(task.job) if task.cluster == "slurm" else None
        return entry if entry and (not entry.script or is_submitted_by(entry, task.sweep)) else None

    def wait_reason(self, task: SubmittedTask, run_id: str) -> str | None:
        """Why this active task has not started the run yet; None where the task is over."""
        if self.is_active(task):
            entry = self.queue_entry(task)
            if entry is None or entry.state == "RUNNING":
                return "starting" if task.runs[0] == run_id else "waits for earlier runs of its task"
            return f"{entry.state} ({entry.reason})" if entry.reason else entry.state
        if task.cluster != "local" and self.queue is None:
            return NO_ANSWER
        is_being_submitted = task.job is None and abs(self.now - task.submitted) < ACCEPTED_WITHIN
        return "being submitted" if is_being_submitted else None

    def _find_live_process(self, task: SubmittedTask) -> bool:
        """For a task without SLURM: whether its process is alive. On another host, the heartbeats of its runs tell."""
        if task.host == socket.gethostname():
            return task.has_process_here()
        return any(RunFolder(self.runs_dir / run_id).is_live() for run_id in task.runs)


def is_submitted_by(entry: QueuedTask, sweep: SweepFolder) -> bool:
    """Whether a task in the queue was submitted by this sweep, under whatever path its folder is mounted."""
    return Path(entry.script).parts[-4:-1] == (".sweeps", sweep.name, "jobs")


def jobs_of(sweep: SweepFolder, array: str, queue: dict[str, QueuedTask]) -> dict[int, str]:
    """{index in the array: job number} for the tasks of an array that are in the queue, by their batch scripts."""
    array_of_script = cache(lambda script: array_of(sweep.jobs / Path(script).name))  # the tasks share one script
    entries = [entry for entry in queue.values() if is_submitted_by(entry, sweep)]
    return {entry.index: entry.job for entry in entries if array_of_script(entry.script) == array}
