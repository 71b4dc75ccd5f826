"""What SLURM's words mean: refusals of sbatch, and the last lines of a job's log. From text to text; nothing is run."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass

LOST = (errno.ENOTCONN, errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT)  # the connection, as a controller dies
SILENCE = (
    "Unable to contact slurm controller",
    "timed out on send/recv",
    "Zero Bytes were transmitted",
    *map(os.strerror, LOST),
)
NODES = "Requested node configuration is not available"
TOO_LONG = "the time limit is above the partition's"
# States in which a node takes or will soon take jobs. `idle*` does not answer; for `mix-` and `plnd` a job is planned.
UP = ("idle", "mix", "alloc", "comp", "plnd")
RELEVANT = (
    "partition",
    "account",
    "qos",
    "nodes",
    "gpus-per-node",
    "gres",
    "cpus-per-task",
    "mem",
    "time",
    "constraint",
)
MINE = "sacctmgr show assoc user=$USER format=account,qos,partition"

# (what SLURM says, what it means and what to do, whether the table of partitions helps)
MEANINGS = (
    (r"invalid partition", "There is no such partition. Choose one: hydra.launcher.partition=NAME", True),
    (r"Invalid account", f"Choose your account: hydra.launcher.account=NAME. Yours: {MINE}", False),
    (r"Invalid qos", f"Choose one of your QOS: hydra.launcher.qos=NAME. Yours: {MINE}", False),
    (
        r"SubmitJob\w*Limit",
        "You may not have so many tasks queued; each task of an array counts. Wait for some to end, submit a part of "
        "the sweep, or put several runs in a task: hydra.launcher.runs_per_task=4",
        False,
    ),
    (
        r"temporarily unavailable|temporarily unable",
        "SLURM's own list of jobs is full (MaxJobCount: everybody's, and those that ended in the last minutes). "
        "Try again later, or put several runs in a task: hydra.launcher.runs_per_task=4",
        False,
    ),
    (
        r"QOS|Assoc|accounting/QOS policy",
        f"A limit of your account or QOS. Ask for less (gpus_per_node, timeout_min, mem_gb), or another: {MINE}",
        False,
    ),
    (r"time limit", "Ask for less time: hydra.launcher.timeout_min=MINUTES. A run that is not done comes back.", True),
    (r"feature", "No node has such a feature: hydra.launcher.constraint=NAME", True),
    (r"array", "The array is larger than MaxArraySize (scontrol show config).", False),
    (r"inactive or drain|not permitted|denied", "Closed, or closed to you: hydra.launcher.partition=NAME", True),
    (r"Invalid node name", "There is no such node: hydra.launcher.exclude, nodelist. `sinfo -N` lists them.", False),
    (
        rf"{NODES}|generic resource|\bMemory\b",
        "No node has all of this. Ask for less: hydra.launcher.gpus_per_node, cpus_per_task, mem_gb, nodes",
        True,
    ),
    (r"unrecognized option|Invalid --", "An option of hydra.launcher or its additional_parameters is wrong.", False),
)

# What slurmstepd and srun write into a job's log, the telling ones first: a job over its memory is also `CANCELLED`.
DEATHS = (
    (r"oom.kill|Out Of Memory|OOM Killed|[Ee]xceeded (?:job )?memory limit", "killed by SLURM: out of memory"),
    (r"DUE TO TIME LIMIT", "killed by SLURM: time limit"),
    (r"DUE TO PREEMPTION", "killed by SLURM: preempted"),
    (r"DUE TO NODE FAILURE|Node failure on", "killed by SLURM: node failure"),
    (r"DUE TO JOB REQUEUE", "stopped by SLURM: queued again"),
    (r"Segmentation fault|Bus error|Aborted|Illegal instruction|Floating point exception", "crashed: {}"),
    (r"CANCELLED AT", "killed by SLURM: cancelled"),
    (r"\bKilled\b", "killed (signal 9): perhaps the node was out of memory"),
    (r"exit code \d+", "ended with {}"),
    (r"(?<=srun: fatal: ).*", "could not start: {}"),
)
SPEAKER = re.compile(r"slurmstepd[^:]*: |srun: |\S*/slurm_script: line ")
START = "Starting with JobEnvironment("  # submitit's first line of each start: a requeued job's log goes on


@dataclass(frozen=True)
class Nodes:
    """Nodes of a partition that are alike. minutes: its longest time limit, None without one; memory in MB."""

    partition: str
    default: bool
    open: bool
    minutes: float | None
    count: int
    cpus: int
    memory: int
    gpus: int
    gres: str
    features: str
    up: bool

    @classmethod
    def of(cls, *fields: str) -> Nodes:
        """From sinfo's %P %a %l %D %c %m %G %f %t."""
        name, availability, limit, count, cpus, memory, gres, features, state = fields
        return cls(
            name.rstrip("*"), name.endswith("*"), availability == "up", minutes(limit), int(count), int(cpus),
            int(memory), gpus(gres), gres.replace("(null)", ""), features.replace("(null)", ""),
            state.rstrip("-") in UP,
        )  # fmt: skip


def minutes(text: str) -> float | None:
    """Of SLURM's M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; None: without limit, or not understood."""
    days, dash, rest = text.rpartition("-")
    if not re.fullmatch(r"\d*(-\d+)?(:\d+)*", text) or not rest:
        return None
    parts = [int(part) for part in rest.split(":")]
    if dash:
        parts = (parts + [0, 0])[:3]
    elif len(parts) < 3:
        parts = [0, *parts, 0][:3]
    return (int(days or 0) * 24 + parts[0]) * 60 + parts[1] + parts[2] / 60


def gpus(gres: str) -> int:
    """`gpu:a100:4(S:0-1),gpu:2` -> 6."""
    return sum(int(number) for number in re.findall(r"\bgpu(?::[^:,(]+)?:(\d+)", gres))


def megabytes(text: str) -> float:
    """`32GB`, `300M`, `4000`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip().upper())
    return float(found[1]) * 1024.0 ** ("KMGT".index(found[2] or "M") - 1) if found else 0.0


def options(script: str) -> dict[str, str]:
    """The `#SBATCH --key=value` lines; a user's SBATCH_PARTITION and the like beat them, as with sbatch."""
    found = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE))
    for variable, key in (("SBATCH_PARTITION", "partition"), ("SBATCH_TIMELIMIT", "time")):
        if os.environ.get(variable):
            found[key] = os.environ[variable]
    return {key: value.strip().strip("'\"") for key, value in found.items()}


def is_silence(stderr: str) -> bool:
    return any(text in stderr for text in SILENCE)


def is_of_nodes(stderr: str) -> bool:
    return NODES in stderr


def wanted(asked: dict[str, str], nodes: list[Nodes]) -> list[Nodes]:
    """The nodes of the partitions that are asked for, or of the default one."""
    names = asked.get("partition", "").split(",")
    return [some for some in nodes if some.partition in names or (some.default and names == [""])]


def will_come(asked: dict[str, str], nodes: list[Nodes]) -> bool:
    """Whether nodes that now are down or drained would do: then the job may wait for them."""
    tasks = _number(asked.get("ntasks-per-node", "1"))
    cpus = _number(asked.get("cpus-per-task", "1")) * tasks
    cards = max(
        _number(asked.get("gpus-per-node", "0")),
        gpus(asked.get("gres", "")),
        _number(asked.get("gpus-per-task", "0")) * tasks,
    )
    memory = max(megabytes(asked.get("mem", "0")), megabytes(asked.get("mem-per-cpu", "0")) * cpus)
    memory = max(memory, megabytes(asked.get("mem-per-gpu", "0")) * cards)
    able = [some for some in wanted(asked, nodes) if some.cpus >= cpus and some.gpus >= cards and some.memory >= memory]
    enough = sum(some.count for some in able) >= _number(asked.get("nodes", "1"))
    return enough and not all(some.up and some.open for some in able)


def _number(text: str) -> int:
    """`2`, or `a100:2`."""
    last = text.rpartition(":")[2]
    return int(last) if last.isdigit() else 1


def too_long(asked: dict[str, str], nodes: list[Nodes]) -> str:
    """A message if no partition that is asked for lets a job run so long; "" if one does."""
    time, here = minutes(asked.get("time", "")), wanted(asked, nodes)
    if time is None or not here or any(some.minutes is None or time <= some.minutes for some in here):
        return ""
    return f"{TOO_LONG}, {time:g} minutes: SLURM would queue the jobs and never start them"


def explained(stderr: str, nodes: list[Nodes], asked: dict[str, str]) -> str:
    """SLURM's refusal with what it means, what was asked and what the partitions have."""
    said = _said(stderr)
    lines = [said if said.startswith(TOO_LONG) else f"SLURM refuses the jobs: {said}"]
    for pattern, meaning, helps in MEANINGS:
        if re.search(pattern, said, re.IGNORECASE):
            lines += [meaning] + [table(nodes)] * (helps and bool(nodes))
            break
    if told := [f"{key}={asked[key]}" for key in RELEVANT if key in asked]:
        lines.insert(1, f"Asked for: {', '.join(told)}")
    return "\n".join(lines)


def _said(stderr: str) -> str:
    """The lines that sbatch wrote, without its prefixes; the last line where there are none."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    of_sbatch = [line for line in lines if re.match(r"sbatch: |allocation failure", line)]
    chosen = [re.sub(r"^sbatch: (error: )?|^allocation failure: ", "", line) for line in of_sbatch or lines[-1:]]
    return "; ".join(dict.fromkeys(chosen)) or "no reason given"


def table(nodes: list[Nodes]) -> str:
    """What the partitions have: one line for nodes that are alike, whatever their state."""
    counts: dict[tuple[str, ...], int] = {}
    for some in nodes:
        limit = "none" if some.minutes is None else f"{some.minutes:g} min"
        name = f"{some.partition}{' (default)' * some.default}{'' if some.open else ' (closed)'}"
        row = (name, limit, str(some.cpus), f"{some.memory} MB", some.gres or "none", some.features or "-")
        counts[row] = counts.get(row, 0) + some.count
    head = ("partition", "time limit", "CPUs", "memory", "GPUs", "features", "nodes")
    rows = [head, *((*row, str(count)) for row, count in counts.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "What there is, per node:\n" + "\n".join(f"  {line}" for line in lines)


def cause_of_death(text: str) -> str:
    """What SLURM says of the end of the last start in a job's log; "" if nothing."""
    lines = [line for line in text.rpartition(START)[2].splitlines() if SPEAKER.match(line)]
    for pattern, phrase in DEATHS:
        for line in lines:
            if found := re.search(pattern, line):
                return phrase.format(found[0])
    return ""
