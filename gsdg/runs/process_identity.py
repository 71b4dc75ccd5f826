"""Which process a run belongs to, and whether it lives: on this host, on another one, in a requeued SLURM job."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from gsdg.errors import UserError

STALE_AFTER = 120.0  # seconds without a heartbeat after which a process on another host counts as dead
NO_FILE_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system mounted without them


class Busy(UserError):
    """Another live process works on this run."""


class LockLost(UserError):
    """Another process has taken this run over: this one must not write any more."""


def slurm_job() -> str | None:
    """`1234_5`, or `1234` for a job that is no array; None outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def node_name() -> str:
    """SLURM's name of this node; elsewhere the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def this_process() -> dict:
    """{host, pid, process_start, job, node, restart}: `restart` counts how often SLURM has requeued the job."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "process_start": process_start(pid),
        "job": slurm_job(),
        "node": os.environ.get("SLURMD_NODENAME"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def process_start(pid: int) -> str | None:
    """When process `pid` started, in the kernel's ticks; "" where the system does not tell; None if it is dead."""
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


def alive(process: dict, heartbeat: float | None) -> bool:
    """Whether `process` {host, pid, process_start} lives: on another host, by its last heartbeat (unix seconds)."""
    if process.get("host") != socket.gethostname():
        return time.time() - (heartbeat or 0.0) < STALE_AFTER
    started = process_start(process["pid"]) if process.get("pid") else None
    return started is not None and started == process.get("process_start", started)


def requeued_since(owner: dict, now: dict) -> bool:
    """Whether `now` is a later start of `owner`'s SLURM job: SLURM has given the earlier one up, dead or not."""
    return bool(now["job"]) and owner.get("job") == now["job"] and now["restart"] > (owner.get("restart") or 0)


def described(process: dict) -> str:
    """`process 12 on n1 (job 34_5, restart 2)`."""
    job = f" (job {process['job']}, restart {process.get('restart') or 0})" if process.get("job") else ""
    return f"process {process.get('pid')} on {process.get('node') or process.get('host')}{job}"


@contextlib.contextmanager
def kernel_lock(path: Path) -> Iterator[None]:
    """Wait until nobody else on this file system is inside. It ends with the process, however that ends.

    A file of its own: NFS locks only what is open for writing, so no folder. Without file locks nothing is waited for.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        raise LockLost(f"{path.parent} is gone: somebody removed it while it was being written.") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_FILE_LOCKS:
                raise
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has it open too
        os.close(descriptor)
