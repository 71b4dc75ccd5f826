"""Which process works on a run, and whether it is alive: on this host, on another host, or in a requeued SLURM job."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

STALE_AFTER = 120.0  # seconds without a heartbeat after which a process on another host counts as dead


def slurm_job() -> str | None:
    """`1234_5` for a task of a SLURM array, `1234` for another SLURM job; None outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def node_name() -> str:
    """SLURM's name of this node; outside of SLURM the hostname."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def this_process() -> dict:
    """This process as {host, pid_namespace, pid, process_start, job, node, restart}.

    restart is the number of times SLURM has requeued the job. The other functions here take such a dict as `process`.
    """
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid_namespace": pid_namespace(),
        "pid": pid,
        "process_start": process_start(pid),
        "job": slurm_job(),
        "node": os.environ.get("SLURMD_NODENAME"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def pid_namespace() -> str | None:
    """The PID namespace of this process: `4026531836 of boot 7d0c...`; None where the system has no such information.

    Two containers can have one hostname, and each of them numbers its processes from 1. Two machines can have one
    hostname too; their initial namespaces have the same number, but their kernels have different boot ids.
    """
    try:
        number = os.stat("/proc/self/ns/pid").st_ino
        return f"{number} of boot {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    except OSError:
        return None


def is_visible(process: dict) -> bool:
    """Whether this process can look up `process` by its pid: it is on the same host and in the same PID namespace.

    Locks that an earlier version wrote have no namespace; for those the host decides.
    """
    same_host = process.get("host") == socket.gethostname()
    return same_host and process.get("pid_namespace") in (None, pid_namespace())


def process_start(pid: int) -> str | None:
    """When process `pid` started, in the kernel's ticks; "" where there is no /proc; None if the process is dead."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def is_alive(process: dict, heartbeat: float | None) -> bool:
    """Whether `process` is alive.

    A visible process is looked up by its pid and start time, since pids are reused. For a process on another host, or
    in another container, the last heartbeat (unix seconds) must be newer than STALE_AFTER.
    """
    if not is_visible(process):
        return time.time() - (heartbeat or 0.0) < STALE_AFTER
    started = process_start(process["pid"]) if process.get("pid") else None
    return started is not None and started == process.get("process_start", started)


def requeued_since(owner: dict, now: dict) -> bool:
    """Whether process `now` is a later start of the SLURM job that process `owner` belongs to.

    SLURM has then given the earlier start up, whether or not that process is dead.
    """
    return bool(now["job"]) and owner.get("job") == now["job"] and now["restart"] > (owner.get("restart") or 0)


def describe_process(process: dict) -> str:
    """`process 12 on n1 (job 34_5, restart 2)`."""
    job = f" (job {process['job']}, restart {process.get('restart') or 0})" if process.get("job") else ""
    same_hostname = process.get("host") == socket.gethostname() and not is_visible(process)
    container = ", in another container or on another machine of that name" if same_hostname else ""
    return f"process {process.get('pid')} on {process.get('node') or process.get('host')}{container}{job}"
