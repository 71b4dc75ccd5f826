"""The state of every run of a sweep, derived from the run's own folder, the sweeps' events and SLURM's queue.

SLURM's queue must be read before the files: a task that ends between the two has then already written its run's final
status. Imports neither torch nor pandas.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gsdg.runs.folder import RunFolder
from gsdg.sweep.folder import FrozenRun
from gsdg.sweep.submissions import NO_ANSWER, History, SubmittedTask
from gsdg.utils.json_files import read_json

STATES = ("done", "running", "pending", "cancelled", "stopped", "failed", "lost", "missing")
ACTIVE = ("running", "pending")
TO_SUBMIT = {  # {value of resubmit=...: the states whose runs are submitted again}
    "missing": {"missing", "lost", "stopped", "cancelled"},
    "failed": {"missing", "lost", "stopped", "cancelled", "failed"},
    "all": set(STATES) - set(ACTIVE),
}
READER_THREADS = 16  # hide the latency of a network file system, which is some milliseconds per small file


@dataclass(frozen=True)
class RunState:
    """The state of one run, as `status` shows it.

    Args:
        run_id: the run's id, which is also the name of its folder.
        state: one of STATES.
        step: optimizer steps done so far.
        steps: optimizer steps in all.
        age: seconds since the last heartbeat; None if the run never had one.
        reason: why the run is in this state; "" where there is no reason to give.
        job: number of the SLURM job (process id without SLURM); None where it is not known.
        host: node that the run works on, or last worked on; None where it is not known.
        config: the frozen config.
        overrides: the Hydra overrides that the config was composed from.
    """

    run_id: str
    state: str
    step: int
    steps: int
    age: float | None
    reason: str
    job: str | None
    host: str | None
    config: dict
    overrides: list[str]


class CachedStatusReader:
    """`read_json` for status files that are read repeatedly: the file of a finished run is read once per version."""

    def __init__(self) -> None:
        self._done: dict[Path, tuple[tuple[int, int], dict]] = {}

    def __call__(self, path: Path) -> dict:
        try:
            info = os.stat(path)
        except OSError:
            return read_json(path)
        version = info.st_ino, info.st_mtime_ns  # a status file is replaced as a whole, so both change
        cached_version, status = self._done.get(path, (None, {}))
        if cached_version == version:
            return status
        status = read_json(path)
        if status.get("state") == "done":
            self._done[path] = version, status
        return status


def run_states(
    runs: list[FrozenRun], runs_dir: Path, queue: dict | None, read: Callable[[Path], dict] | None = None
) -> list[RunState]:
    """The state of each of these runs in `runs_dir`, in order, whether or not the run was ever submitted.

    Args:
        queue: the result of `slurm.queue()`; None where SLURM is absent or does not answer.
        read: reads a status file; callers that poll pass one `CachedStatusReader`. Default: `read_json`.
    """
    return run_states_from(History(runs_dir, queue), runs, read)


def run_states_from(
    history: History, runs: list[FrozenRun], read: Callable[[Path], dict] | None = None
) -> list[RunState]:
    """As `run_states`, for a History that was already read."""
    statuses = read_statuses(history.runs_dir, [run.run_id for run in runs], read)
    return [_run_state(run, statuses[run.run_id], history) for run in runs]


def state_names(history: History, run_ids: Iterable[str]) -> dict[str, str]:
    """{run id: its state}."""
    statuses = read_statuses(history.runs_dir, run_ids)
    return {
        run_id: derive_state(run_id, status, history.task(run_id), history)[0] for run_id, status in statuses.items()
    }


def read_statuses(
    runs_dir: Path, run_ids: Iterable[str], read: Callable[[Path], dict] | None = None
) -> dict[str, dict]:
    """{run id: the content of its status.json}, {} for a run that has none.

    Lists `runs_dir` once, then reads one small file for each run that has a folder.
    """
    read_status = read or read_json
    run_ids = list(dict.fromkeys(run_ids))
    folders = set(os.listdir(runs_dir)) if Path(runs_dir).is_dir() else set()

    def read_share(share: list[str]) -> dict[str, dict]:
        return {name: read_status(Path(runs_dir) / name / "status.json") if name in folders else {} for name in share}

    with ThreadPoolExecutor(READER_THREADS) as pool:
        shares = list(pool.map(read_share, [run_ids[i::READER_THREADS] for i in range(READER_THREADS)]))
    return {name: status for share in shares for name, status in share.items()}


def _run_state(run: FrozenRun, status: dict, history: History) -> RunState:
    task = history.task(run.run_id)
    state, reason = derive_state(run.run_id, status, task, history)
    job, host = status.get("job") or (task.job if task else None), status.get("node") or status.get("host")
    if task and state == "pending":  # the status file names the job and the host of an earlier start
        entry = history.queue_entry(task)
        job, host = (entry.job, entry.node or None) if entry else (task.job, None)
    steps = status.get("steps") or run.config["trainer"]["steps"]
    age = max(0.0, history.now - status["heartbeat"]) if "heartbeat" in status else None
    step = steps if state == "done" else status.get("step") or 0
    return RunState(run.run_id, state, step, steps, age, reason, job, host, run.config, run.overrides)


# ---- the rules ------------------------------------------------------------------------------------------------------


def derive_state(run_id: str, status: dict, task: SubmittedTask | None, history: History) -> tuple[str, str]:
    """(state, reason) of one run, by the first of these rules that applies:

    1. running: status.json says so and the process is alive (or its heartbeat is recent).
    2. failed: an event of the sweep says so, because the run's own folder could not be written; not if the run is done
       by now, or was cancelled after its task was submitted.
    3. pending: the task is active, and status.json is from an earlier submission; not if the run was cancelled.
    4. done: status.json says so.
    5. cancelled: after the task was submitted.
    6. pending: the task is active, so it will start or resume the run; not if the run failed in this task.
    7. failed: status.json says so.
    8. stopped: status.json says so.
    9. lost: status.json says running, or a task was submitted, but neither the process nor the task exists any more.
    10. missing: never submitted.

    Args:
        status: content of the run's status.json, {} if there is none.
        task: the task that has or had the run, `history.task(run_id)`; None if the run was never submitted.
    """
    run = _Evidence(run_id, status, task, history)
    return next((state, reason(run)) for applies, state, reason in RULES if applies(run))


class _Evidence:
    """What the files, the events and the queue say about one run, for the conditions and reasons of RULES.

    Attributes:
        task: the run's task; None if the run was never submitted.
        noted_state: the state in status.json, which an earlier submission may have written; None without the file.
        waiting: why the task has not started the run yet; NO_ANSWER where that is unknown; None if the task is over.
        cancelled: whether the run was cancelled after its task was submitted.
        failure_event: why the run failed, by the events of the sweep; None if they note no failure.
    """

    def __init__(self, run_id: str, status: dict, task: SubmittedTask | None, history: History) -> None:
        self._run_id, self._status, self._history = run_id, status, history
        self.task = task
        self.noted_state = status.get("state")
        self.waiting = history.wait_reason(task, run_id) if task else None
        self.cancelled = history.is_cancelled(run_id, task)
        self.failure_event = history.failure_reason(run_id, task)

    def is_alive(self) -> bool:
        """Whether a process is at work on the run.

        A cancelled task that has left SLURM's queue is over: its last heartbeat predates the end of the task.
        """
        if self.noted_state != "running":
            return False
        task_is_over = self.cancelled and not self.waiting and self._was_last_run_by_slurm()
        return not task_is_over and RunFolder(self._history.runs_dir / self._run_id).is_live(self._status)

    def is_of_earlier_submission(self) -> bool:
        """Whether status.json was written before this task was submitted.

        Decided by the name of the submission, not by the time of a heartbeat: clocks of hosts differ. A run that is
        done was done by this task or by hand, unless it was done already when the task was submitted.
        """
        if self.task is None or (self.noted_state == "done" and self._run_id not in self.task.done_before):
            return False
        return not self._history.is_not_older(self._status.get("submission"), self.task)

    def noted_reason(self, default: str) -> str:
        """The first line of the reason in status.json."""
        return (str(self._status.get("reason") or "") or default).splitlines()[0]

    def doubt(self) -> str:
        """A suffix for the reasons of states that are uncertain while SLURM does not answer."""
        return f" ({NO_ANSWER})" if self.waiting == NO_ANSWER else ""

    def loss_reason(self) -> str:
        """Why the task ended, by the job's log; else the age of the last heartbeat, or of the submission."""
        task = self.task
        job = (task.job or self._status.get("job")) if task else None
        if task and job and (reason := self._history.termination_reason(task.sweep.log_of(job))):
            return reason
        if task is None or (self.noted_state == "running" and self._last_run_is_latest()):
            heartbeat = self._status.get("heartbeat", 0.0)
            return f"no heartbeat for {format_duration(self._history.now - heartbeat)}"
        where = "its process is gone" if task.cluster == "local" else "gone from SLURM's queue"
        age = format_duration(self._history.now - task.submitted)
        return f"submitted {age} ago, {where} without a trace"

    def _was_last_run_by_slurm(self) -> bool:
        """Whether the last process that worked on the run belonged to this task, under SLURM."""
        task = self.task
        return task is not None and task.cluster == "slurm" and self._status.get("submission") == task.array

    def _last_run_is_latest(self) -> bool:
        """Whether status.json was written by this task, by a later one, or by a run by hand (no submission)."""
        submission = self._status.get("submission")
        return self.task is None or submission is None or self._history.is_not_older(submission, self.task)


def _no_reason(run: _Evidence) -> str:
    return ""


# (condition, state, reason): the first condition that holds decides; `derive_state` describes the rules. Reasons are
# functions because the reason of a lost run reads a log file.
Rule = tuple[Callable[[_Evidence], object], str, Callable[[_Evidence], str]]
RULES: tuple[Rule, ...] = (
    (lambda run: run.is_alive(), "running", lambda run: "cancelled: about to stop" if run.cancelled else ""),
    (
        lambda run: run.failure_event and run.noted_state != "done" and not run.cancelled,
        "failed",
        lambda run: run.failure_event or "",
    ),
    (
        lambda run: run.waiting and run.is_of_earlier_submission() and not run.cancelled,
        "pending",
        lambda run: run.waiting or "",
    ),
    (lambda run: run.noted_state == "done", "done", _no_reason),
    (lambda run: run.cancelled, "cancelled", _no_reason),
    (
        lambda run: run.waiting and run.waiting != NO_ANSWER and run.noted_state != "failed",
        "pending",
        lambda run: run.waiting or "",
    ),
    (lambda run: run.noted_state == "failed", "failed", lambda run: run.noted_reason("no reason noted")),
    (
        lambda run: run.noted_state == "stopped",
        "stopped",
        lambda run: run.noted_reason("stopped by a signal") + run.doubt(),
    ),
    (lambda run: run.noted_state == "running" or run.task, "lost", lambda run: run.loss_reason() + run.doubt()),
    (lambda run: True, "missing", _no_reason),
)


def format_duration(seconds: float) -> str:
    """A duration in about two digits: `45 s`, `12 min`, `3.5 h`, `2.1 days`. Negative durations are `0 s`."""
    seconds = max(0.0, seconds)  # the clock of the host that noted the time may be ahead
    for limit, unit, name in ((99.5, 1, "s"), (99.5 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            digits = 1 if name == "h" else 0
            return f"{seconds / unit:.{digits}f} {name}"
    return f"{seconds / 86400:.1f} days"
