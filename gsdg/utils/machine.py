"""What this process may use of the machine it runs on."""

from __future__ import annotations

import os


def usable_cores(most: int = 8) -> int:
    """How many cores this process may use, `most` at most.

    SLURM_CPUS_PER_TASK counts too, because some clusters do not bind the processes of a job to its cores.
    """
    visible = visible_cores()
    return min(most, visible, int(os.environ.get("SLURM_CPUS_PER_TASK") or visible))


def visible_cores() -> int:
    """The number of cores that the operating system lets this process use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
