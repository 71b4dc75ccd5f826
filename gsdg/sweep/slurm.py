"""All that we ask SLURM: what is queued, what it would refuse, and to cancel. Its client commands and nothing else.

No question waits for ever: a controller that does not answer is `SlurmSilent`. sacct is never asked: many clusters
keep no accounts. Facts noted here were seen with SLURM 22.05. Standard library only.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gsdg.errors import UserError, listing
from gsdg.sweep import refusals

log = logging.getLogger(__name__)
COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo")
PATIENCE = 60.0  # seconds; the client commands give up by themselves after 10 to 20
PIECES = 100  # runs of indices in "12_[1-3,7]", and such arguments in one scancel: a command line has its limits
CLOCKS = 15.0  # seconds by which this machine's clock may differ from the controller's
OF_A_JOB = ("SLURM_JOB", "SLURM_ARRAY", "SLURM_STEP")  # the variables that only a job has
FORGET = "unset $(env | grep -o '^SLURM[A-Z0-9_]*' | grep -v '^SLURM_CONF$') CUDA_VISIBLE_DEVICES"
TAIL = 16384  # bytes
# `squeue --array` forgets the last of an array's waiting tasks where these are evenly spaced: 12_[0-98:2%4]
LAST_OF_STEPS = re.compile(r"(\d+)_\[\d+-(\d+):\d+(?:%\d+)?\]")


class SlurmSilent(UserError):
    """SLURM did not answer: nothing is known of its queue. What was submitted is not affected."""


@dataclass(frozen=True)
class Queued:
    """A task that SLURM will start or that works: job "1234_5", or "1234" outside arrays; node "" while it waits."""

    job: str
    state: str  # PENDING, RUNNING, ... as SLURM says it
    reason: str  # why it waits; "" where SLURM gives none
    node: str


def refuse_here() -> None:
    """UserError where nothing can be submitted: without SLURM, or inside one of its jobs."""
    absent = [name for name in COMMANDS if not shutil.which(name)]
    if absent:
        raise UserError(
            f"there is no SLURM here: {listing(absent)} not on PATH.\n"
            "Run this on the cluster's login node, or choose hydra/launcher=local for this machine."
        )
    inherited = sorted(name for name in os.environ if name.startswith(OF_A_JOB))
    if inherited:
        job = os.environ.get("SLURM_JOB_ID")
        raise UserError(
            f"this is inside {f'job {job}' if job else 'a job'} of SLURM ({inherited[0]} is set): what is submitted "
            f"here inherits the job's variables and goes wrong.\nSubmit from a login node, or forget the job in this "
            f"shell first:\n    {FORGET}"
        )


def max_array_size() -> int:
    """How many tasks one array may have."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config"), re.MULTILINE)
    return max(1, int(found[1])) if found else 1001


def queue(prefix: str = "gsdg-", owners: Iterable[int] = ()) -> dict[tuple[str, int], Queued]:
    """Tasks whose job name starts with `prefix`, by (name, index in the array; 0 outside arrays).

    Of this user and of `owners`, user ids, as far as the cluster shows their jobs (some hide those of others).

    All that will still start or is at work. A task that is over and only being cleaned up is not among them; one that
    is requeued while its last start is being cleaned up is PENDING. SlurmSilent if SLURM does not answer.
    """
    users = ",".join(map(str, {os.geteuid(), *owners}))  # squeue passes over one who has left the cluster
    whole = _squeue(users)  # first: what starts in between is then in the second answer
    found = {}
    for job, index, state, end, node, reason, name in _squeue(users, "--array"):
        if state == "COMPLETING":
            if _is_past(end):
                continue
            state, node, reason = "PENDING", "", "queued again"
        found[name, int(index) if index.isdigit() else 0] = Queued(job, state, "" if reason == "None" else reason, node)
    for job, _, state, _, node, reason, name in whole:
        if forgotten := LAST_OF_STEPS.fullmatch(job):
            array, index = forgotten.groups()
            found.setdefault((name, int(index)), Queued(f"{array}_{index}", state, reason, node))
    return {key: queued for key, queued in found.items() if key[0].startswith(prefix)}


def _squeue(users: str, *options: str) -> list[list[str]]:
    fields = "\x1f".join(("%i", "%K", "%T", "%e", "%N", "%r", "%j"))  # unpadded: a name may be long and hold anything
    said = _ask("squeue", "--noheader", f"--user={users}", f"--format={fields}", *options)
    return [line.split("\x1f") for line in said.splitlines()]


def _is_past(end: str) -> bool:
    """A requeued job has its next end to come; NONE: without a limit, which may be either, so it counts as to come."""
    return end.isdigit() and int(end) <= time.time() + CLOCKS


def test(script: str) -> None:
    """Ask SLURM whether it would take this batch script. UserError with what the cluster has, if not.

    `sbatch --test-only` alone will not do: it refuses what merely has to wait for nodes that are down or drained, and
    takes a time limit above the partition's, which would wait for ever.
    """
    asked = refusals.options(script)
    try:
        _ask("sbatch", "--test-only", text=script)
    except SlurmSilent:
        raise
    except UserError as error:
        nodes = _nodes()
        if refusals.is_of_nodes(str(error)) and refusals.will_come(asked, nodes):
            log.warning("no node can take these jobs at the moment (down, drained or reserved): they will wait")
            return
        raise UserError(refusals.explained(str(error), nodes, asked)) from None
    nodes = _nodes()
    if message := refusals.too_long(asked, nodes):
        raise UserError(refusals.explained(message, nodes, asked))


def explain(stderr: str) -> str:
    """What a refusal of sbatch means, what is valid and what to do."""
    try:
        return refusals.explained(stderr, _nodes(), {})
    except UserError:
        return refusals.explained(stderr, [], {})


def cancel(jobs: list[str]) -> None:
    """scancel these ("1234", "1234_5"); what is already over is no error. SlurmSilent if SLURM does not answer."""
    arrays = defaultdict(set)
    pieces = [job for job in dict.fromkeys(jobs) if "_" not in job]
    for job in jobs:
        if "_" in job:
            array, index = job.split("_")
            arrays[array].add(int(index))
    pieces += [f"{array}_[{run}]" for array, indices in arrays.items() for run in _runs(sorted(indices))]
    pieces = iter(pieces)
    while batch := list(islice(pieces, PIECES)):
        _ask("scancel", *batch)


def _runs(numbers: list[int]) -> list[str]:
    """[1, 2, 3, 7] -> ["1-3,7"], in portions of PIECES: SLURM takes them some hundred times faster than one by one."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return [",".join(texts[start : start + PIECES]) for start in range(0, len(texts), PIECES)]


def last_words(log: Path) -> str:
    """Why a task died, as SLURM said at the end of its log: `killed by SLURM: time limit`; "" if it said nothing."""
    try:
        with Path(log).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return refusals.cause_of_death(text)


# ---- asking -------------------------------------------------------------------------------------------------


def _nodes() -> list[refusals.Nodes]:
    """What the partitions have, up or down."""
    fields = "\x1f".join(("%P", "%a", "%l", "%D", "%c", "%m", "%G", "%f", "%t"))
    said = _ask("sinfo", "--exact", "--noheader", f"--format={fields}")
    return [refusals.Nodes.of(*line.split("\x1f")) for line in said.splitlines()]


def _ask(*command: str, text: str | None = None) -> str:
    """The command's stdout. SlurmSilent if SLURM does not answer, UserError with stderr if it refuses."""
    try:
        done = subprocess.run(
            command, input=text, env=_environment(), capture_output=True, text=True, errors="replace", timeout=PATIENCE
        )
    except FileNotFoundError:
        raise UserError(f"there is no SLURM here: {command[0]} is not on PATH.") from None
    except subprocess.TimeoutExpired:
        raise _silent(command, f"no answer within {PATIENCE:.0f} s") from None
    if refusals.is_silence(done.stderr):
        raise _silent(command, done.stderr.strip())
    if done.returncode:
        raise UserError(done.stderr.strip() or f"{command[0]} ended with {done.returncode}")
    return done.stdout


def _silent(command: tuple[str, ...], why: str) -> SlurmSilent:
    return SlurmSilent(
        f"SLURM does not answer: `{' '.join(command[:3])}`: {why}\n"
        "Its controller may be restarting: try again in a minute; `scontrol ping` tells. Jobs are not affected."
    )


def _environment() -> dict[str, str]:
    """Ours without a user's own defaults for these commands' output, such as SQUEUE_STATES; times in unix seconds."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SQUEUE_", "SINFO_", "SCANCEL_"))}
    return {**kept, "SLURM_TIME_FORMAT": "%s"}
