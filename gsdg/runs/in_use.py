"""What submitted tasks of sweeps may still need of a runs_dir: their runs, and their copies of the code.

A task that is still in SLURM's queue may be started again, and then looks for every run of its pack. If one of these
was done and has been removed, the task would train it again. Where it is unknown whether something is needed, it counts
as needed. Standard library only.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gsdg.runs.batch_script import array_of
from gsdg.runs.process_identity import STALE_AFTER, process_start
from gsdg.utils.json_files import read_json, read_lines

SQUEUE_TIMEOUT = 60.0  # seconds
ACCEPTED_WITHIN = 600.0  # seconds that sbatch may take; a submission without a job number counts as queued until then
OVER = ("done", "failed")  # states of a run that no task continues
WAITING_ARRAY = re.compile(r"(\d+)_\[(.*?)(?:%\d+)?\]")


@dataclass(frozen=True)
class Queue:
    """The jobs in SLURM's queue.

    Args:
        jobs: ids such as `12` and `12_3`.
        scripts: paths of the jobs' batch scripts.
        abridged: ids of arrays of which squeue has not listed every task.
    """

    jobs: frozenset[str]
    scripts: frozenset[str]
    abridged: frozenset[str] = frozenset()

    def has(self, job: str) -> bool:
        return job in self.jobs or job.partition("_")[0] in self.abridged

    def arrays(self) -> set[str]:
        """The names of the arrays that these jobs belong to, read from their batch scripts."""
        return {array_of(Path(script)) for script in self.scripts} - {""}


@dataclass(frozen=True)
class RecordedTask:
    """A submitted task, as the events of its sweep record it.

    Args:
        sweep: the name of its sweep.
        cluster: slurm or local.
        array: the name of its array.
        runs: the run ids of its pack.
        time: when it was submitted, in unix seconds.
        job: its id in SLURM, or without SLURM its pid; None if the launching process died before it knew the id.
        host: where the sweep was launched.
        code: the name of its copy of the code; None if it was not recorded.
    """

    sweep: str
    cluster: str
    array: str
    runs: tuple[str, ...]
    time: float
    job: str | None
    host: str | None
    code: str | None


class Submissions:
    """The tasks that were submitted from `runs_dir` and that may still start or are at work."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = Path(runs_dir)
        self.queue = ask_squeue()
        self._arrays = self.queue.arrays() if self.queue else set()
        self.tasks = [task for task in submitted_tasks(self.runs_dir) if self._may_start(task)]
        self._by_run = {run_id: task for task in self.tasks for run_id in task.runs}

    def reason_needed(self, run_id: str, status: dict) -> str:
        """Why a task may still need the run; "" if no task does. status: the content of the run's status.json."""
        if task := self._by_run.get(run_id):
            return f"sweep {task.sweep} may still need it: {self._describe(task)}"
        job = status.get("job")
        if not job or status.get("state") in OVER:
            return ""
        if self.queue is None:
            return f"job {job} may start it again: SLURM does not answer here"
        return f"job {job} is still in SLURM's queue" if self.queue.has(str(job)) else ""

    def needs_code(self, name: str) -> bool:
        """Whether a task may still start from this copy of the code."""
        return any(task.code in (None, name) for task in self.tasks)

    def _describe(self, task: RecordedTask) -> str:
        if task.cluster == "local":
            return f"its process {task.job} on {task.host} is at work"
        if self.queue is None:
            return f"job {task.job or task.array} may be in SLURM's queue: SLURM does not answer here"
        return f"job {task.job} is still in SLURM's queue" if task.job else f"{task.array} is being submitted"

    def _may_start(self, task: RecordedTask) -> bool:
        """Whether the task is at work, or may be started (again). If that is unknown, the answer is yes."""
        if task.cluster == "local":
            return self._is_at_work(task)
        if self.queue is None:
            return not all(map(self._is_over, task.runs))
        if task.job is None:
            return task.array in self._arrays or time.time() - task.time < ACCEPTED_WITHIN
        return self.queue.has(task.job)

    def _is_at_work(self, task: RecordedTask) -> bool:
        """Whether the process of a task without SLURM is alive; on another host, whether its runs send heartbeats."""
        if task.host == socket.gethostname() and task.job:
            return process_start(int(task.job)) is not None and _command_names(int(task.job), task.sweep)
        heartbeats = [self._status(run_id).get("heartbeat", 0.0) for run_id in task.runs]
        return time.time() - max([task.time, *heartbeats]) < STALE_AFTER

    def _is_over(self, run_id: str) -> bool:
        return self._status(run_id).get("state") in OVER

    def _status(self, run_id: str) -> dict:
        return read_json(self.runs_dir / run_id / "status.json")


def submitted_tasks(runs_dir: Path) -> Iterator[RecordedTask]:
    """Every task that a sweep under `runs_dir` has submitted, from its events.jsonl (see gsdg.sweep.folder)."""
    for path in sorted(Path(runs_dir).glob(".sweeps/*/events.jsonl")):
        events = read_lines(path)
        accepted = {event["array"]: event for event in events if event.get("event") == "accepted"}
        for event in events:
            if event.get("event") == "submitted":
                yield from _tasks(path.parent.name, event, accepted.get(event["array"], {}))


def _tasks(sweep: str, event: dict, accepted: dict) -> Iterator[RecordedTask]:
    jobs = accepted.get("jobs") or [None] * len(event["packs"])
    shared = {"sweep": sweep, "cluster": event["cluster"], "array": event["array"], "time": event["time"]}
    for pack, job in zip(event["packs"], jobs, strict=False):
        host, code = accepted.get("host"), event.get("code")
        yield RecordedTask(runs=tuple(pack), job=job and str(job), host=host, code=code, **shared)


def ask_squeue() -> Queue | None:
    """SLURM's queue, with the jobs of all users; None where there is no SLURM or it does not answer."""
    if not shutil.which("squeue"):
        return None
    command = ["squeue", "--noheader", "--format=%i\x1f%o"]
    environment = {**os.environ, "SLURM_BITSTR_LEN": "0"}  # list all indices of an array
    try:
        answer = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=SQUEUE_TIMEOUT, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if answer.returncode else parse_squeue(answer.stdout.splitlines())


def parse_squeue(lines: Iterable[str]) -> Queue:
    """Parse lines `id\\x1fscript`. The waiting tasks of an array are one line, such as `12_[0-3,7%2]`."""
    jobs, scripts, abridged = set(), set(), set()
    for line in lines:
        job, _, script = line.strip().partition("\x1f")
        scripts.add(script)
        if array := WAITING_ARRAY.fullmatch(job):
            indices = _indices(array[2])
            jobs |= {f"{array[1]}_{index}" for index in indices or ()}
            abridged |= {array[1]} if indices is None else set()
        else:
            jobs.add(job)
    return Queue(frozenset(jobs), frozenset(scripts), frozenset(abridged))


def _indices(text: str) -> list[int] | None:
    """`0-3,7,10-20:5` -> [0, 1, 2, 3, 7, 10, 15, 20]; None if squeue has truncated the list."""
    indices: list[int] = []
    for piece in text.split(","):
        if not (match := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", piece)):
            return None
        first, last, step = match[1], match[2] or match[1], match[3] or 1
        indices += range(int(first), int(last) + 1, int(step))
    return indices


def _command_names(pid: int, sweep: str) -> bool:
    """Whether the command line of process `pid` contains the sweep's name: the pid may have been reused."""
    try:
        return sweep.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True  # there is no /proc: the pid alone decides
