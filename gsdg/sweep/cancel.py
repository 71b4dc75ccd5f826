"""Cancelling runs of a sweep: recorded first in the events of the sweeps that submitted them, then with scancel.

Whatever fails after the events are written, a task that starts reads there that its runs were cancelled, and ends.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter

from gsdg.sweep import slurm
from gsdg.sweep.folder import FrozenRun, SweepFolder
from gsdg.sweep.run_states import ACTIVE, RunState, format_duration, run_states_from, state_names
from gsdg.sweep.submissions import NO_ANSWER, History, SubmittedTask, jobs_of
from gsdg.utils.errors import UserError, listing, plural


class Cancellation:
    """Which runs of a sweep can be cancelled, and cancelling them.

    Args:
        sweep: the sweep that the user named.
        runs: the runs of the sweep that the user selected.
        queue: the result of `slurm.queue()`; None where SLURM does not answer.
    """

    def __init__(self, sweep: SweepFolder, runs: list[FrozenRun], queue: dict | None) -> None:
        self.sweep, self.count, self.queue = sweep, len(runs), queue
        self.history = History(sweep.runs_dir, queue)
        # Runs that were cancelled before are included: their tasks may still be in SLURM's queue.
        states = run_states_from(self.history, runs)
        self.candidates = [run for run in states if run.state in (*ACTIVE, "cancelled")]
        self.tasks = self.history.active_tasks(run.run_id for run in self.candidates)
        self.to_cancel = [run for run in self.candidates if run.state != "cancelled" and self._was_submitted(run)]

    def describe(self) -> str:
        """The sweep, its owner, its age, and which of its runs would be cancelled."""
        owner = "yours" if self.sweep.is_mine() else f"of {self.sweep.owner_name}, none is yours"
        age = format_duration(self.history.now - self.sweep.created)
        return (
            f"{self.sweep.name} ({owner}, launched {age} ago).\n"
            f"To cancel: {len(self.to_cancel)} of its {plural(self.count, 'run')} ({self._count_states()})"
        )

    def carry_out(self) -> list[str]:
        """Cancel the runs.

        Returns:
            Lines that say what was done.

        Raises:
            UserError: a sweep that submitted one of the runs cannot be written, such as that of another user.
        """
        self._record()
        summary = f"sweep {self.sweep.name}: {len(self.to_cancel)} of {plural(self.count, 'run')} cancelled"
        lines = [f"{summary} ({self._count_states()})" if self.to_cancel else summary]
        for run in self.candidates:
            if run.state == "running" and run not in self.to_cancel:
                lines.append(f"left alone: run {run.run_id} is running on {run.host}, but not in a task of a sweep")
        lines += withdraw(self.tasks, History(self.sweep.runs_dir, self.queue))
        if self.queue is None and self.to_cancel:
            lines.append(
                f"{NO_ANSWER}: tasks that are running stop by themselves, tasks that are waiting stay in the queue. "
                "Cancel again when SLURM answers."
            )
        return lines

    def _was_submitted(self, run: RunState) -> bool:
        """Whether the run belongs to a submitted task: a task in the queue, or one that cannot be seen from here."""
        task = self.history.task(run.run_id)
        unseen = task is not None and (self.queue is None or task.cluster == "local" or run.state == "pending")
        return unseen or any(run.run_id in task.runs for task in self.tasks)

    def _count_states(self) -> str:
        """`2 running, 3 pending`: the states of the runs to cancel."""
        return listing(f"{count} {state}" for state, count in Counter(run.state for run in self.to_cancel).items())

    def _record(self) -> None:
        """Append an event to every sweep that submitted one of the runs: a task reads the events of its own sweep."""
        run_ids = [run.run_id for run in self.to_cancel]
        tasks = [task for task in self.tasks if not set(run_ids).isdisjoint(task.runs)]
        sweeps = {task.sweep.path: task.sweep for task in [*tasks, *filter(None, map(self.history.task, run_ids))]}
        for sweep in sweeps.values():  # all of them are checked before the first is written
            _check_writable(sweep)
        for sweep in sweeps.values():
            try:
                sweep.append("cancelled", runs=run_ids)
            except OSError as error:
                raise UserError(
                    f"cannot write {error.filename or sweep.path}: {error.strerror or error}.\n"
                    "No task was removed from SLURM's queue. Free some space there, and cancel again."
                ) from error


def _check_writable(sweep: SweepFolder) -> None:
    events = sweep.path / "events.jsonl"
    if not os.access(events if events.exists() else sweep.path, os.W_OK):
        raise UserError(
            f"sweep {sweep.name} was submitted by {sweep.owner_name}, and you may not write in {sweep.path}.\n"
            f"Nothing was cancelled. Ask {sweep.owner_name} to cancel it, or cancel one of your own sweeps."
        )


def withdraw(tasks: list[SubmittedTask], history: History) -> list[str]:
    """scancel the tasks whose remaining runs are all cancelled. The others stop their cancelled runs themselves.

    Args:
        history: read after the cancellation was recorded.

    Returns:
        Lines that say what was done.
    """
    states = state_names(history, (run_id for task in tasks for run_id in task.runs))
    active = {run_id for run_id, state in states.items() if state in ACTIVE}
    needed = {run_id for run_id in active if not history.is_cancelled(run_id, history.task(run_id))}
    unneeded = [task for task in tasks if task.cluster == "slurm" and needed.isdisjoint(task.runs)]
    lines = []
    if unneeded:
        lines.append(_scancel(unneeded))
    if len(tasks) > len(unneeded):
        left = plural(len(tasks) - len(unneeded), "task")
        lines.append(f"{left} left to stop the cancelled runs, which takes seconds")
    return lines


def withdraw_submission(sweep: SweepFolder, arrays: list[str], jobs: list[str]) -> str:
    """scancel a submission that failed halfway.

    Args:
        arrays: the names of its arrays: tasks of them may be in the queue although their job ids were not recorded.
        jobs: the job ids that were recorded.

    Returns:
        A line for the message about the failure; "" if SLURM has no task of the submission.
    """
    job_ids = set(jobs)
    try:
        queue = slurm.queue()
        job_ids |= {job for array in arrays for job in jobs_of(sweep, array, queue).values()}
        slurm.cancel(sorted(job_ids))
    except UserError as error:
        command = shlex.join(["python", "-m", "gsdg.sweep", "cancel", sweep.name, "--runs-dir", str(sweep.runs_dir)])
        return (
            f"\nSome of its tasks may still be queued: {str(error).splitlines()[0]}\n"
            f"They end as soon as they start. To remove them from the queue later: {command}"
        )
    if not job_ids:
        return ""
    return f"\n{plural(len(job_ids), 'task')} submitted before it withdrawn: nothing of this sweep is queued."


def _scancel(tasks: list[SubmittedTask]) -> str:
    try:
        slurm.cancel([task.job for task in tasks if task.job])
    except UserError as error:  # SLURM does not answer, or the tasks belong to another user
        reason = str(error).splitlines()[0]
        return (
            f"{plural(len(tasks), 'task')} not removed from SLURM's queue: {reason}\n"
            "Their runs are cancelled nevertheless: a task that starts reads this and ends."
        )
    return f"{plural(len(tasks), 'task')} removed from SLURM's queue"
