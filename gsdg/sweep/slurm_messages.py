"""Explains SLURM's messages: the refusals of sbatch, and the last lines of a job's log. Text in, text out.

`explain` and `termination_reason` are the two entry points; slurm.py runs the commands.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass

from gsdg.utils.text import align_columns

# Connection errors that a client reports while its controller is going down.
CONNECTION_ERRORS = (errno.ENOTCONN, errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT)
NO_ANSWER_TEXTS = (
    "Unable to contact slurm controller",
    "timed out on send/recv",
    "Zero Bytes were transmitted",
    *map(os.strerror, CONNECTION_ERRORS),
)
NODES_UNAVAILABLE = "Requested node configuration is not available"
TOO_LONG = "the time limit is above the partition's"
# States in which a node accepts jobs, now or soon. `idle*` does not answer; for `mix-` and `plnd` a job is planned.
UP_STATES = ("idle", "mix", "alloc", "comp", "plnd")
# Options of the batch script that an error message repeats.
SHOWN_OPTIONS = (
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
SACCTMGR = "sacctmgr show assoc user=$USER format=account,qos,partition"

# (pattern in SLURM's message, what it means and what to do, whether to show the table of partitions)
EXPLANATIONS = (
    (r"invalid partition", "There is no such partition. Choose one: hydra.launcher.partition=NAME", True),
    (r"Invalid account", f"Choose your account: hydra.launcher.account=NAME. Yours: {SACCTMGR}", False),
    (r"Invalid qos", f"Choose one of your QOS: hydra.launcher.qos=NAME. Yours: {SACCTMGR}", False),
    (
        r"SubmitJob\w*Limit",
        "You may not have so many tasks queued; each task of an array counts. Wait for some to end, submit a part of "
        "the sweep, or put several runs in a task: hydra.launcher.runs_per_task=4",
        False,
    ),
    (
        r"temporarily unavailable|temporarily unable",
        "SLURM's own list of jobs is full (MaxJobCount: it counts the jobs of all users, also those that ended in the "
        "last minutes). Try again later, or put several runs in a task: hydra.launcher.runs_per_task=4",
        False,
    ),
    (
        r"QOS|Assoc|accounting/QOS policy",
        f"A limit of your account or QOS. Ask for less (gpus_per_node, timeout_min, mem_gb), or another: {SACCTMGR}",
        False,
    ),
    (
        r"time limit",
        "Ask for less time: hydra.launcher.timeout_min=MINUTES. A run that is not done then resumes.",
        True,
    ),
    (r"feature", "No node has this feature. Choose another: hydra.launcher.constraint=NAME", True),
    (r"array", "The array is larger than MaxArraySize (scontrol show config).", False),
    (
        r"inactive or drain|not permitted|denied",
        "Closed, or closed to you. Choose another: hydra.launcher.partition=NAME",
        True,
    ),
    (
        r"Invalid node name",
        "There is no such node. Check hydra.launcher.exclude and nodelist; `sinfo -N` lists them.",
        False,
    ),
    (
        rf"{NODES_UNAVAILABLE}|generic resource|\bMemory\b",
        "No node has all of this. Ask for less: hydra.launcher.gpus_per_node, cpus_per_task, mem_gb, nodes",
        True,
    ),
    (r"unrecognized option|Invalid --", "An option of hydra.launcher or its additional_parameters is wrong.", False),
)

# (pattern in what slurmstepd and srun write into a job's log, what happened), the specific patterns first: a job that
# ran out of memory is also `CANCELLED`.
TERMINATIONS = (
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
SLURM_LINE = re.compile(r"slurmstepd[^:]*: |srun: |\S*/slurm_script: line ")
START_LINE = "Starting with JobEnvironment("  # submitit's first line per start: a requeued job appends to its log


@dataclass(frozen=True)
class NodeGroup:
    """Equal nodes of a partition.

    Args:
        partition: name of the partition.
        default: whether it is the default partition.
        open: whether the partition accepts jobs.
        minutes: the partition's time limit; None without a limit.
        count: number of nodes.
        cpus: CPUs per node.
        memory: megabytes per node.
        gpus: GPUs per node.
        gres: SLURM's description of the GPUs, such as `gpu:a100:4`; "" without GPUs.
        features: names that `--constraint` accepts.
        up: whether the nodes accept jobs, now or soon.
    """

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
    def of(cls, *fields: str) -> NodeGroup:
        """From the fields %P %a %l %D %c %m %G %f %t of sinfo."""
        name, availability, limit, count, cpus, memory, gres, features, state = fields
        return cls(
            name.rstrip("*"), name.endswith("*"), availability == "up", minutes(limit), int(count), int(cpus),
            int(memory), gpus(gres), gres.replace("(null)", ""), features.replace("(null)", ""),
            state.rstrip("-") in UP_STATES,
        )  # fmt: skip


def minutes(text: str) -> float | None:
    """The minutes of a time limit M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None: unlimited, or another format."""
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
    """The number of GPUs in a gres: `gpu:a100:4(S:0-1),gpu:2` -> 6."""
    return sum(int(number) for number in re.findall(r"\bgpu(?::[^:,(]+)?:(\d+)", gres))


def megabytes(text: str) -> float:
    """The megabytes of `32GB`, `300M` or `4000`; 0.0 for another format."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip().upper())
    return float(match[1]) * 1024.0 ** ("KMGT".index(match[2] or "M") - 1) if match else 0.0


def options(script: str) -> dict[str, str]:
    """{key: value} of the `#SBATCH --key=value` lines of a batch script."""
    lines = re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE)
    return {key: value.strip().strip("'\"") for key, value in lines}


def is_no_answer(stderr: str) -> bool:
    """Whether a client command failed because SLURM's controller did not answer."""
    return any(text in stderr for text in NO_ANSWER_TEXTS)


def is_about_nodes(stderr: str) -> bool:
    """Whether sbatch refused a script because no node can take it, now or ever."""
    return NODES_UNAVAILABLE in stderr


def requested_nodes(requested: dict[str, str], nodes: list[NodeGroup]) -> list[NodeGroup]:
    """The nodes of the requested partitions; those of the default partition where none is requested."""
    names = requested.get("partition", "").split(",")
    return [group for group in nodes if group.partition in names or (group.default and names == [""])]


def could_start_later(requested: dict[str, str], nodes: list[NodeGroup]) -> bool:
    """Whether nodes that are down or drained now could take the job: then it may wait for them in the queue.

    Args:
        requested: the options of the batch script.
    """
    # What the job needs, per node.
    tasks = _number(requested.get("ntasks-per-node", "1"))
    cpus = _number(requested.get("cpus-per-task", "1")) * tasks
    gpu_count = max(
        _number(requested.get("gpus-per-node", "0")),
        gpus(requested.get("gres", "")),
        _number(requested.get("gpus-per-task", "0")) * tasks,
    )
    memory = max(
        megabytes(requested.get("mem", "0")),
        megabytes(requested.get("mem-per-cpu", "0")) * cpus,
        megabytes(requested.get("mem-per-gpu", "0")) * gpu_count,
    )
    # The nodes that are large enough, whatever their state.
    suitable = [
        group
        for group in requested_nodes(requested, nodes)
        if group.cpus >= cpus and group.gpus >= gpu_count and group.memory >= memory
    ]
    enough = sum(group.count for group in suitable) >= _number(requested.get("nodes", "1"))
    return enough and not all(group.up and group.open for group in suitable)


def _number(text: str) -> int:
    """The number in `2` or `a100:2`; 1 where there is none."""
    last = text.rpartition(":")[2]
    return int(last) if last.isdigit() else 1


def time_limit_problem(requested: dict[str, str], nodes: list[NodeGroup]) -> str:
    """A message if the time limit is above that of every requested partition; "" if one of them allows it."""
    time, groups = minutes(requested.get("time", "")), requested_nodes(requested, nodes)
    if time is None or not groups or any(group.minutes is None or time <= group.minutes for group in groups):
        return ""
    return f"{TOO_LONG}, {time:g} minutes: SLURM would queue the jobs and never start them"


# ---- messages -------------------------------------------------------------------------------------------------------


def explain(stderr: str, nodes: list[NodeGroup], requested: dict[str, str]) -> str:
    """SLURM's refusal, what it means, what was requested and, where that helps, what the partitions have.

    Args:
        stderr: of sbatch, or a message of `time_limit_problem`.
        nodes: all nodes of the cluster; [] where they are not known.
        requested: the options of the batch script; {} where they are not known.
    """
    message = _sbatch_message(stderr)
    lines = [message if message.startswith(TOO_LONG) else f"SLURM refuses the jobs: {message}"]
    if shown := [f"{key}={requested[key]}" for key in SHOWN_OPTIONS if key in requested]:
        lines.append(f"Asked for: {', '.join(shown)}")
    for pattern, meaning, show_table in EXPLANATIONS:
        if re.search(pattern, message, re.IGNORECASE):
            lines += [meaning] + [partition_table(nodes)] * (show_table and bool(nodes))
            break
    return "\n".join(lines)


def _sbatch_message(stderr: str) -> str:
    """The lines that sbatch wrote, without its prefixes; the last line of `stderr` where sbatch wrote none."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    sbatch_lines = [line for line in lines if re.match(r"sbatch: |allocation failure", line)]
    chosen = [re.sub(r"^sbatch: (error: )?|^allocation failure: ", "", line) for line in sbatch_lines or lines[-1:]]
    return "; ".join(dict.fromkeys(chosen)) or "no reason given"


def partition_table(nodes: list[NodeGroup]) -> str:
    """What the partitions have: one line per kind of node, whatever the state of the nodes."""
    counts: dict[tuple[str, ...], int] = {}
    for group in nodes:
        limit = "none" if group.minutes is None else f"{group.minutes:g} min"
        name = f"{group.partition}{' (default)' * group.default}{'' if group.open else ' (closed)'}"
        row = (name, limit, str(group.cpus), f"{group.memory} MB", group.gres or "none", group.features or "-")
        counts[row] = counts.get(row, 0) + group.count
    head = ("partition", "time limit", "CPUs", "memory", "GPUs", "features", "nodes")
    rows = [head, *((*row, str(count)) for row, count in counts.items())]
    return "What there is, per node:\n" + "\n".join(f"  {line}" for line in align_columns(rows))


def termination_reason(text: str) -> str:
    """What SLURM wrote in a job's log about the end of the last start; "" if it wrote nothing."""
    lines = [line for line in text.rpartition(START_LINE)[2].splitlines() if SLURM_LINE.match(line)]
    for pattern, phrase in TERMINATIONS:
        for line in lines:
            if match := re.search(pattern, line):
                return phrase.format(match[0])
    return ""
