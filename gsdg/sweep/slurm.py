"""All calls of SLURM's client commands: read the queue, test a batch script, cancel jobs.

No call waits for ever: a controller that does not answer raises `SlurmNotResponding`. sacct is never called, because
many clusters have no accounting database. Comments describe the behaviour of SLURM 22.05. Standard library only.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gsdg.sweep import slurm_messages
from gsdg.utils.errors import UserError, listing

log = logging.getLogger(__name__)
COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo")
PATIENCE = 60.0  # seconds to wait for a client command, which itself gives up after 10 to 20 s
MAX_ARGUMENTS = 100  # per scancel, and index ranges per argument "12_[1-3,7]": the length of a command line is limited
JOB_VARIABLES = ("SLURM_JOB", "SLURM_ARRAY", "SLURM_STEP")  # prefixes of variables that are set inside a job only
UNSET_JOB_VARIABLES = "unset $(env | grep -o '^SLURM[A-Z0-9_]*' | grep -v '^SLURM_CONF$') CUDA_VISIBLE_DEVICES"
TAIL = 16384  # bytes at the end of a log that are read
# The error messages of bootstrap.py, and of Python where it is itself missing from the copy of the code.
COPY_DAMAGED = re.compile(
    r"^error: the copy of the code at .* is damaged|can't open file '.*/\.code.*bootstrap\.py'", re.MULTILINE
)
# A bug of `squeue --array`: where the pending indices of an array are evenly spaced, 12_[0-98:2%4], it omits the last.
EVENLY_SPACED = re.compile(r"(\d+)_\[\d+-(\d+):\d+(?:%\d+)?\]")


class SlurmNotResponding(UserError):
    """SLURM did not answer, so the state of its queue is unknown. Submitted jobs are not affected."""


@dataclass(frozen=True)
class QueuedTask:
    """A task in SLURM's queue: pending or running.

    Args:
        job: job number: `1234_5` for an element of an array, else `1234`.
        state: SLURM's name of the state, such as PENDING or RUNNING.
        reason: why the task is pending; "" where SLURM gives no reason.
        node: the node that the task runs on; "" while it is pending.
        script: path of the batch script, which cannot be changed after the submission, unlike the job's name; "" where
            SLURM has none.
    """

    job: str
    state: str
    reason: str
    node: str
    script: str = ""

    @property
    def index(self) -> int:
        """The index in the array; 0 for a job that is no array."""
        return int(self.job.partition("_")[2] or 0)


def check_can_submit() -> None:
    """UserError on a host without SLURM's commands, and inside a SLURM job."""
    absent = [name for name in COMMANDS if not shutil.which(name)]
    if absent:
        raise UserError(
            f"there is no SLURM here: {listing(absent)} not on PATH.\n"
            "Run this on the cluster's login node, or choose hydra/launcher=local for this machine."
        )
    inherited = sorted(name for name in os.environ if name.startswith(JOB_VARIABLES))
    if inherited:
        job = os.environ.get("SLURM_JOB_ID")
        raise UserError(
            f"this is inside {f'job {job}' if job else 'a job'} of SLURM ({inherited[0]} is set): jobs that are "
            f"submitted here inherit its variables and fail.\nSubmit from a login node, or unset the variables in this "
            f"shell first:\n    {UNSET_JOB_VARIABLES}"
        )


def max_array_size() -> int:
    """The largest number of tasks that SLURM accepts in one array."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _run_command("scontrol", "show", "config"), re.MULTILINE)
    return max(1, int(match[1])) if match else 1001


def queue(owners: Iterable[int] = ()) -> dict[str, QueuedTask]:
    """{job number: task} for all pending and running tasks of this user and of `owners`.

    A COMPLETING task is not included if it is over. If it was requeued while its last start is being cleaned up, it is
    included as PENDING. Some clusters hide the jobs of other users.

    Args:
        owners: ids of other users.

    Raises:
        SlurmNotResponding: SLURM does not answer.
    """
    users = ",".join(map(str, {os.geteuid(), *owners}))  # squeue ignores the id of a user who has left the cluster
    abridged = _squeue(users)  # called first, so that a task that starts between the calls is in the second answer
    tasks: dict[str, QueuedTask] = {}
    for job, state, reason, node, script, *times in _squeue(users, "--array"):
        if state == "COMPLETING":
            if _is_over(*times):
                continue
            state, node, reason = "PENDING", "", "queued again"
        tasks[job] = QueuedTask(job, state, "" if reason == "None" else reason, node, script)
    for job, state, reason, node, script, *_ in abridged:
        if match := EVENLY_SPACED.fullmatch(job):
            last = "_".join(match.groups())
            tasks.setdefault(last, QueuedTask(last, state, reason, node, script))
    return tasks


def _squeue(users: str, *options: str) -> list[list[str]]:
    """The fields of every line of squeue: job, state, reason, node, script, start, end, used time."""
    fields = "\x1f".join(("%i", "%T", "%r", "%N", "%o", "%S", "%e", "%M"))  # a path may contain any other separator
    answer = _run_command("squeue", "--noheader", f"--user={users}", f"--format={fields}", *options)
    lines = [line.replace("(null)", "").split("\x1f") for line in answer.splitlines()]
    return [line for line in lines if len(line) == 8]  # with SLURM_CLUSTERS, squeue also prints the cluster's name


def _is_over(start: str, end: str, used: str) -> bool:
    """Whether a COMPLETING task is over and not requeued, by the times of SLURM's own clock only.

    A requeued task has used no time, and its end is in the future (next start + time limit) or NONE.
    """
    return used != "0:00" or (start.isdigit() and end.isdigit() and int(end) - int(start) <= 1)


def check_accepted(script: str) -> None:
    """UserError, with a table of what the cluster has, if SLURM would refuse this batch script.

    `sbatch --test-only` alone is not enough: it refuses jobs that only have to wait for nodes that are down or drained,
    and it accepts a time limit above the partition's limit, with which a job stays pending for ever.
    """
    requested = slurm_messages.options(script)
    try:
        _run_command("sbatch", "--test-only", text=script)
    except SlurmNotResponding:
        raise
    except UserError as error:
        nodes = _node_groups()
        if slurm_messages.is_about_nodes(str(error)) and slurm_messages.could_start_later(requested, nodes):
            log.warning("no node can take these jobs at the moment (down, drained or reserved): they will wait")
            return
        raise UserError(slurm_messages.explain(str(error), nodes, requested)) from None
    nodes = _node_groups()
    if message := slurm_messages.time_limit_problem(requested, nodes):
        raise UserError(slurm_messages.explain(message, nodes, requested))


def explain_refusal(stderr: str) -> str:
    """The error message of sbatch, with its meaning, what is valid and what to do."""
    try:
        return slurm_messages.explain(stderr, _node_groups(), {})
    except UserError:
        return slurm_messages.explain(stderr, [], {})


def cancel(jobs: list[str]) -> None:
    """scancel these jobs (`1234`, `1234_5`). A job that is already over is no error.

    SlurmNotResponding if SLURM does not answer.
    """
    arrays = defaultdict(set)
    arguments = [job for job in dict.fromkeys(jobs) if "_" not in job]
    for job in jobs:
        if "_" in job:
            array, index = job.split("_")
            arrays[array].add(int(index))
    # SLURM cancels 12_[1-3,7] some hundred times faster than its tasks one by one.
    arguments += [f"{array}_[{text}]" for array, indices in arrays.items() for text in _index_ranges(sorted(indices))]
    remaining = iter(arguments)
    while batch := list(islice(remaining, MAX_ARGUMENTS)):
        _run_command("scancel", *batch)


def _index_ranges(numbers: list[int]) -> list[str]:
    """[1, 2, 3, 7] -> ["1-3,7"], at most MAX_ARGUMENTS ranges per text."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return [",".join(texts[start : start + MAX_ARGUMENTS]) for start in range(0, len(texts), MAX_ARGUMENTS)]


def termination_reason(log: Path) -> str:
    """Why a task ended, by the last lines of its log: `killed by SLURM: time limit`; "" if they do not say."""
    try:
        with Path(log).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    if reason := slurm_messages.termination_reason(text):
        return reason
    last_start = text.rpartition(slurm_messages.START_LINE)[2]
    if COPY_DAMAGED.search(last_start):
        return "the copy of the code that it was submitted with is damaged: submit it again, which makes the copy again"
    return ""


# ---- running the commands ---------------------------------------------------------------------------------------


def _node_groups() -> list[slurm_messages.NodeGroup]:
    """The nodes of all partitions, up or down, in groups of equal nodes."""
    fields = "\x1f".join(("%P", "%a", "%l", "%D", "%c", "%m", "%G", "%f", "%t"))
    output = _run_command("sinfo", "--exact", "--noheader", f"--format={fields}")
    return [slurm_messages.NodeGroup.of(*line.split("\x1f")) for line in output.splitlines()]


def _run_command(*command: str, text: str | None = None) -> str:
    """The command's stdout; `text` is its stdin.

    SlurmNotResponding if SLURM does not answer; UserError, with the command's stderr, if the command fails.
    """
    try:
        done = subprocess.run(
            command, input=text, env=_environment(), capture_output=True, text=True, errors="replace", timeout=PATIENCE
        )
    except (FileNotFoundError, PermissionError):  # the latter also for a folder on PATH that this user may not read
        raise UserError(f"there is no SLURM here: {command[0]} is not on PATH, or may not be run.") from None
    except subprocess.TimeoutExpired:
        raise _not_responding(command, f"no answer within {PATIENCE:.0f} s") from None
    if slurm_messages.is_no_answer(done.stderr):
        raise _not_responding(command, done.stderr.strip())
    if done.returncode:
        raise UserError(done.stderr.strip() or f"{command[0]} ended with {done.returncode}")
    return done.stdout


def _not_responding(command: tuple[str, ...], why: str) -> SlurmNotResponding:
    return SlurmNotResponding(
        f"SLURM does not answer: `{' '.join(command[:3])}`: {why}\n"
        "Its controller may be restarting: try again in a minute; `scontrol ping` shows it. Jobs are not affected."
    )


def _environment() -> dict[str, str]:
    """This process's environment without the user's output defaults, such as SQUEUE_STATES; times in unix seconds."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SQUEUE_", "SINFO_", "SCANCEL_"))}
    return {**kept, "SLURM_TIME_FORMAT": "%s"}
