"""A real SLURM cluster of pretend nodes on this machine, and the accidents that befall it. No pytest in it.

with temporary_lab(nodes=2) as lab:
    job = lab.submit("--gres=gpu:1", script="sleep 60")
    lab.wait(lambda: lab.state(job) == "RUNNING")
    lab.kill_node(lab.node_of(job))
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

HERE = Path(__file__).parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "munged", "tini")
PACKAGES = "slurmctld slurmd slurm-client munge tini"
SETTINGS = {"max_array_size": 1001, "max_jobs": 100000, "kill_wait": 2, "grace_time": 10, "user_signal": True}
PREFIX = "gsdg-slurm-"
HALF_A_NODE = (  # overrides of a sweep whose tasks fit two on a pretend node
    "hydra/launcher=slurm_cpu",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=2",  # a run has 0.8 GB, and once more for a moment whenever it forks: SLURM may look then
    "hydra.launcher.timeout_min=10",
    "hydra.launcher.signal_delay_s=60",
)
RESERVED: list[socket.socket] = []  # of the labs of this process
Value = TypeVar("Value")


def missing() -> str:
    """Why no cluster can be had here; "" if one can."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=search_path())]
    if absent:
        return f"SLURM is not installed ({', '.join(absent)} absent): apt-get install {PACKAGES}, see README.md"
    return "" if os.geteuid() == 0 else "the test cluster needs root: its nodes end processes of jobs"


def search_path() -> str:
    """Where the daemons may be: a user's PATH often leaves out /usr/sbin."""
    return os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"


def free_port_base(nodes: int) -> int:
    """A number below the ports that the system hands out itself, with the lab's ports above it free.

    The port of that number, which no daemon uses, is kept as long as this process lives: no other lab gets the same.
    """
    for _ in range(100):
        base = random.SystemRandom().randrange(16800, 32000, 200)
        if reserved := _listening(base):
            if all(_free(base + offset) for offset in (17, *range(101, 101 + nodes))):
                RESERVED.append(reserved)
                return base
            reserved.close()
    raise RuntimeError("no free ports for a test cluster between 16800 and 32200")


def _free(port: int) -> bool:
    if probe := _listening(port):
        probe.close()
    return probe is not None


def _listening(port: int) -> socket.socket | None:
    """A socket that listens at the port; None where that is taken."""
    ours = socket.socket()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a dead daemon's connections leave is no obstacle
    try:
        ours.bind(("127.0.0.1", port))
        ours.listen()  # two that are merely bound do not see one another
    except OSError:
        ours.close()
        return None
    return ours


class Lab:
    """A cluster with its state in `folder` (a path under 80 characters), nodes named n1, n2, ...

    Partition main is preempted (REQUEUE) by partition high once no node is free. `settings` are those of `up`:
    max_array_size, max_jobs, kill_wait and grace_time (seconds), user_signal (False: preemption is TERM, then KILL).
    """

    def __init__(self, folder: Path, *, nodes: int = 4, port_base: int | None = None, **settings: object) -> None:
        self.folder = Path(folder)
        self.nodes = nodes
        self.port_base = port_base or int(os.environ.get("SLURMLAB_PORT_BASE", 0)) or free_port_base(nodes)
        self.settings = {**SETTINGS}
        self._change(settings)

    # ---- the cluster ------------------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """To add to os.environ: the client commands then talk to this cluster."""
        return {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    def up(self) -> None:
        """Start whatever does not run; returns once all nodes can take jobs. RuntimeError if that fails."""
        self._script("up")

    def down(self) -> None:
        """End every process of this cluster, jobs and leftovers too."""
        self._script("down")

    def configure(self, **settings: object) -> None:
        """Change settings while the cluster runs (max_array_size and max_jobs restart the controller)."""
        self._change(settings)
        if {"max_array_size", "max_jobs"} & set(settings):
            self.kill_controller(signal.SIGTERM)
        self._script("up", "reconfigure")

    def _change(self, settings: dict) -> None:
        unknown = set(settings) - set(SETTINGS)
        if unknown:
            raise TypeError(f"unknown settings {unknown}; valid: {', '.join(SETTINGS)}")
        self.settings.update(settings)

    def _script(self, name: str, *arguments: str) -> None:
        values = {"nodes": self.nodes, "port_base": self.port_base, **self.settings}
        settings = {f"SLURMLAB_{key.upper()}": str(int(value)) for key, value in values.items()}
        log = Path(f"{self.folder}.{name}.log")  # a file, not a pipe: daemons would hold a pipe open
        with log.open("w+") as output:
            command = [str(HERE / name), str(self.folder), *arguments]
            environment = {**os.environ, "PATH": search_path(), **settings}
            process = subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=300)
        said = log.read_text()
        log.unlink()
        if process.returncode:
            raise RuntimeError(f"{name} of the test cluster failed:\n{said}")

    # ---- asking -----------------------------------------------------------------------------------------------

    def run(self, *command: str, seconds: float = 120, check: bool = True, **more: str) -> str:
        """What a command says on stdout, in the cluster's environment plus `more`. RuntimeError if it fails."""
        own = ("SQUEUE_", "SINFO_", "SCANCEL_")  # a user's defaults for these commands' output
        kept = {key: value for key, value in os.environ.items() if not key.startswith(own)}
        environment = {**kept, **self.environment, **more}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *options: str, script: str = "sleep 600") -> str:
        """sbatch of a small script's text; the job's number."""
        where = f"--output={self.folder}/log/%A_%a.out"
        return self.run("sbatch", "--parsable", where, *options, f"--wrap={script}").strip()

    def states(self) -> dict[str, str]:
        """{"12_3" or "12": "RUNNING"} of all that SLURM still has in its queue."""
        lines = self.run("squeue", "--array", "--noheader", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, ... COMPLETED, CANCELLED: of one job or task, over ones too; "" where it is forgotten."""
        said = self.run("scontrol", "--oneliner", "show", "job", job, check=False)
        return said.partition("JobState=")[2].partition(" ")[0]

    def node_of(self, job: str) -> int:
        """The number of the node that a running job is on."""
        return int(
            self.run("squeue", "--array", "--noheader", "--format=%N", f"--jobs={job}").strip().removeprefix("n")
        )

    def wait(self, condition: Callable[[], Value], seconds: float = 120, every: float = 0.2) -> Value:
        """What `condition` returns as soon as it is true. TimeoutError with the queue's state if it never is."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > end:
                queue = self.run("squeue", "--array", check=False)
                raise TimeoutError(f"not within {seconds} s; the queue:\n{queue}")
            time.sleep(every)
        return value

    # ---- accidents --------------------------------------------------------------------------------------------

    def kill_node(self, node: int, *, told: bool = False) -> None:
        """Power off: its slurmd, step daemons and jobs. SLURM notices after some 28 s, at once if `told`."""
        self._script("nodefail", f"n{node}")
        self._tell(node, told)

    def kill_slurmd_only(self, node: int, *, told: bool = False) -> None:
        """Lost to SLURM, which requeues its jobs after some 28 s (at once if `told`), while their processes live on."""
        self._script("nodefail", f"n{node}", "slurmd")
        self._tell(node, told)

    def _tell(self, node: int, told: bool) -> None:
        if told:
            self.run("scontrol", "update", f"nodename=n{node}", "state=down", "reason=powered off")

    def return_node(self, node: int) -> None:
        """Bring a failed node back (and any other that is down)."""
        self.up()

    def kill_controller(self, signal_number: int = signal.SIGKILL) -> None:
        """End slurmctld: what it did not save yet is lost. Clients get no answer until `start_controller()`."""
        pid = int((self.folder / "run" / "slurmctld.pid").read_text())
        os.kill(pid, signal_number)
        end = time.monotonic() + 60
        while is_alive(pid) and time.monotonic() < end:
            time.sleep(0.05)

    def start_controller(self) -> None:
        self.up()

    def clear(self) -> None:
        """Cancel everything and wait until it is gone, with all nodes back: as after `up`."""
        self.up()
        for user in set(self.run("squeue", "--noheader", "--format=%U").split()):
            self.run("scancel", f"--user={user}")
        self.wait(lambda: not self.states())


@contextlib.contextmanager
def temporary_lab(**settings: object) -> Iterator[Lab]:
    """A cluster that is up, in a folder of its own; ended and removed afterwards, as are those of killed sessions."""
    remove_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))  # short: sockets lie in it
    (folder / "owner").write_text(str(os.getpid()))
    lab = Lab(folder, **settings)
    try:
        lab.up()
        yield lab
    finally:
        lab.down()
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned() -> None:
    """End the clusters of `temporary_lab`s whose process is dead."""
    for note in Path("/tmp").glob(f"{PREFIX}*/owner"):
        if not is_alive(int(note.read_text() or 1)):
            Lab(note.parent, port_base=1).down()
            shutil.rmtree(note.parent, ignore_errors=True)


def is_alive(pid: int) -> bool:
    return process_state(pid) not in ("", "Z", "X")


def process_state(pid: int) -> str:
    """R, S, D, T (stopped), Z (dead, not yet reaped), ...; "" where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
