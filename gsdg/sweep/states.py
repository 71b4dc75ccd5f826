"""How every run of a sweep stands: its own folder is asked first, then what was submitted, then SLURM's queue.

The queue must be read before the disk: a task that ends in between has then left its word on disk. No torch, no pandas.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gsdg.runs import RunFolder, read_json
from gsdg.sweep.folder import Frozen
from gsdg.sweep.history import SILENT, History, Submitted

STATES = ("done", "running", "pending", "cancelled", "stopped", "failed", "lost", "missing")
TO_COME = ("running", "pending")
TO_SUBMIT = {  # of resubmit=...: the states whose runs are submitted again
    "missing": {"missing", "lost", "stopped", "cancelled"},
    "failed": {"missing", "lost", "stopped", "cancelled", "failed"},
    "all": set(STATES) - set(TO_COME),
}
READERS = 16  # threads: a network file system answers many small questions at once


@dataclass(frozen=True)
class Standing:
    """One run. age: seconds since its last heartbeat, None if it never had one; reason: "" where there is none."""

    run_id: str
    state: str  # one of STATES
    step: int
    steps: int
    age: float | None
    reason: str
    job: str | None
    host: str | None
    config: dict
    overrides: list[str]


def stand(runs: list[Frozen], runs_dir: Path, queue: dict | None) -> list[Standing]:
    """How these runs stand in `runs_dir`, whether or not they were ever submitted.

    queue: of `slurm.queue()`; None where SLURM is absent or silent.
    """
    return stand_in(History(runs_dir, queue), runs)


def stand_in(history: History, runs: list[Frozen]) -> list[Standing]:
    found = statuses(history.runs_dir, [run.run_id for run in runs])
    return [_standing(run, found[run.run_id], history) for run in runs]


def states_in(history: History, run_ids: Iterable[str]) -> dict[str, str]:
    """{run id: its state}."""
    found = statuses(history.runs_dir, run_ids)
    return {run_id: _judge(run_id, status, history.task(run_id), history)[0] for run_id, status in found.items()}


def statuses(runs_dir: Path, run_ids: Iterable[str]) -> dict[str, dict]:
    """{run id: its status.json, {} where it has none}. One listing, then one small file for each run that exists."""
    run_ids = list(dict.fromkeys(run_ids))
    there = set(os.listdir(runs_dir)) if Path(runs_dir).is_dir() else set()

    def some(share: list[str]) -> dict[str, dict]:
        return {name: read_json(Path(runs_dir) / name / "status.json") if name in there else {} for name in share}

    with ThreadPoolExecutor(READERS) as pool:
        shares = list(pool.map(some, [run_ids[i::READERS] for i in range(READERS)]))
    return {name: status for share in shares for name, status in share.items()}


def _standing(run: Frozen, status: dict, history: History) -> Standing:
    task = history.task(run.run_id)
    state, reason = _judge(run.run_id, status, task, history)
    job, host = status.get("job") or (task and task.job), status.get("node") or status.get("host")
    if state == "pending":
        queued = (history.queue or {}).get(task.key)
        job, host = (queued.job, queued.node or None) if queued else (task.job, None)
    steps = status.get("steps") or run.config["trainer"]["steps"]
    age = max(0.0, history.now - status["heartbeat"]) if "heartbeat" in status else None
    step = steps if state == "done" else status.get("step") or 0
    return Standing(run.run_id, state, step, steps, age, reason, job, host, run.config, run.overrides)


def _judge(run_id: str, status: dict, task: Submitted | None, history: History) -> tuple[str, str]:
    """(state, reason). The order of the rules is their meaning."""
    said, reason = status.get("state"), str(status.get("reason") or "")
    wait = task and history.wait(task, run_id)
    new = wait and not _heard_since(status, task)  # what the folder says is of an earlier submission
    cancelled = history.cancelled(run_id, task)
    ended = cancelled and not wait and _of_slurm(status, task)  # its heartbeat is an echo
    if said == "running" and not ended and RunFolder(history.runs_dir / run_id).is_live(status):
        return "running", "cancelled: about to stop" if cancelled else ""
    if new and not cancelled:
        return "pending", wait
    if said == "done":
        return "done", ""
    if cancelled:
        return "cancelled", ""
    if wait and wait != SILENT and said != "failed":
        return "pending", wait
    doubt = f" ({SILENT})" if wait == SILENT else ""
    if said == "failed":
        return "failed", (reason or "no reason noted").splitlines()[0]
    if said == "stopped":
        return "stopped", (reason or "stopped by a signal").splitlines()[0] + doubt
    if said == "running" or task:
        return "lost", _last_words(status, task, history) + doubt
    return "missing", ""


def _of_slurm(status: dict, task: Submitted | None) -> bool:
    """Whether it was this task, on SLURM, that worked on the run last."""
    return task is not None and task.cluster == "slurm" and status.get("submission") == task.array


def _heard_since(status: dict, task: Submitted) -> bool:
    """Whether the run gave a sign of life since this task was submitted; its folder names the array that started it."""
    return status.get("submission") == task.array or status.get("heartbeat", 0.0) > task.submitted


def _last_words(status: dict, task: Submitted | None, history: History) -> str:
    """What the job's log says of its end, else what is known of the silence."""
    job = task and (task.job or status.get("job"))
    if job and (words := history.last_words(task.sweep.log_of(job))):
        return words
    if status.get("state") == "running" and (task is None or _heard_since(status, task)):
        return f"no heartbeat for {span(history.now - status.get('heartbeat', 0.0))}"
    where = "its process is gone" if task.cluster == "local" else "gone from SLURM's queue"
    return f"submitted {span(history.now - task.submitted)} ago, {where} without a trace"


def span(seconds: float) -> str:
    """A length of time to two digits or so: `45 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for limit, unit, name in ((99.5, 1, "s"), (99.5 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            digits = 1 if name == "h" else 0
            return f"{seconds / unit:.{digits}f} {name}"
    return f"{seconds / 86400:.1f} days"
