"""A real SLURM cluster of pretend nodes on this machine, and simulated accidents. Imports no pytest.

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
HALF_A_NODE = (  # overrides with which two tasks fit on a pretend node
    "hydra/launcher=slurm_cpu",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=2",  # a run uses 0.8 GB, and counts twice for a moment whenever it forks
    "hydra.launcher.timeout_min=10",
    "hydra.launcher.signal_delay_s=60",
)
RESERVED: list[socket.socket] = []  # of the clusters that this process started
Value = TypeVar("Value")


def missing() -> str:
    """Why no cluster can be started here; "" if one can."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=search_path())]
    if absent:
        return f"SLURM is not installed ({', '.join(absent)} absent): apt-get install {PACKAGES}, see CONTRIBUTING.md"
    return "" if os.geteuid() == 0 else "the test cluster needs root: its nodes end processes of jobs"


def search_path() -> str:
    """PATH with the folders of the daemons: a user's PATH often lacks /usr/sbin."""
    return os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"


def free_port_base(nodes: int) -> int:
    """A port number below the system's ephemeral ports, such that the ports which the cluster derives from it are free.

    No daemon uses the port of this number itself. This process keeps it open, so that no other cluster gets the same.
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
    """A socket that listens at the port; None if the port is in use."""
    ours = socket.socket()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore connections of a dead daemon in TIME_WAIT
    try:
        ours.bind(("127.0.0.1", port))
        ours.listen()  # with SO_REUSEADDR, bind() alone would not fail for a second process
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
        """Variables with which the client commands use this cluster."""
        return {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    def up(self) -> None:
        """Start all daemons that are not running, and wait until all nodes accept jobs. RuntimeError if that fails."""
        self._script("up")

    def down(self) -> None:
        """End every process of this cluster, including jobs."""
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
        messages = log.read_text()
        log.unlink()
        if process.returncode:
            raise RuntimeError(f"{name} of the test cluster failed:\n{messages}")

    # ---- asking -----------------------------------------------------------------------------------------------

    def run(self, *command: str, seconds: float = 120, check: bool = True, **more: str) -> str:
        """The stdout of a command that runs in the cluster's environment plus `more`. RuntimeError if it fails."""
        defaults = ("SQUEUE_", "SINFO_", "SCANCEL_")  # the user's defaults for the output of these commands
        kept = {key: value for key, value in os.environ.items() if not key.startswith(defaults)}
        environment = {**kept, **self.environment, **more}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *options: str, script: str = "sleep 600") -> str:
        """Submit a small script; returns the job number."""
        where = f"--output={self.folder}/log/%A_%a.out"
        return self.run("sbatch", "--parsable", where, *options, f"--wrap={script}").strip()

    def states(self) -> dict[str, str]:
        """{"12_3" or "12": "RUNNING"} for all jobs in SLURM's queue."""
        lines = self.run("squeue", "--array", "--noheader", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, ... COMPLETED, CANCELLED: the state of a job or task; "" once SLURM has forgotten it."""
        answer = self.run("scontrol", "--oneliner", "show", "job", job, check=False)
        return answer.partition("JobState=")[2].partition(" ")[0]

    def node_of(self, job: str) -> int:
        """The number of the node that a running job is on."""
        return int(
            self.run("squeue", "--array", "--noheader", "--format=%N", f"--jobs={job}").strip().removeprefix("n")
        )

    def wait(self, condition: Callable[[], Value], seconds: float = 120, every: float = 0.2) -> Value:
        """Wait until `condition()` is true, and return its value. TimeoutError, with the queue, after `seconds`."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > end:
                queue = self.run("squeue", "--array", check=False)
                raise TimeoutError(f"not within {seconds} s; the queue:\n{queue}")
            time.sleep(every)
        return value

    # ---- accidents --------------------------------------------------------------------------------------------

    def kill_node(self, node: int, *, announced: bool = False) -> None:
        """Power off: kill its slurmd, step daemons and jobs. SLURM notices after about 28 s, at once if `announced`."""
        self._script("nodefail", f"n{node}")
        self._announce(node, announced)

    def kill_slurmd_only(self, node: int, *, announced: bool = False) -> None:
        """Kill slurmd: SLURM requeues its jobs after about 28 s (at once if `announced`); their processes live on."""
        self._script("nodefail", f"n{node}", "slurmd")
        self._announce(node, announced)

    def _announce(self, node: int, announced: bool) -> None:
        if announced:
            self.run("scontrol", "update", f"nodename=n{node}", "state=down", "reason=powered off")

    def return_node(self, node: int) -> None:
        """Bring a failed node back (and any other that is down)."""
        self.up()

    def kill_controller(self, signal_number: int = signal.SIGKILL) -> None:
        """Kill slurmctld; unsaved state is lost. Clients get no answer until `start_controller()`."""
        pid = int((self.folder / "run" / "slurmctld.pid").read_text())
        os.kill(pid, signal_number)
        end = time.monotonic() + 60
        while is_alive(pid) and time.monotonic() < end:
            time.sleep(0.05)

    def start_controller(self) -> None:
        self.up()

    def clear(self) -> None:
        """Cancel all jobs, wait until they are gone, and bring all nodes back, as after `up`."""
        self.up()
        for user in set(self.run("squeue", "--noheader", "--format=%U").split()):
            self.run("scancel", f"--user={user}")
        self.wait(lambda: not self.states())


@contextlib.contextmanager
def temporary_lab(**settings: object) -> Iterator[Lab]:
    """A running cluster in a temporary folder, ended and removed afterwards, like the clusters of killed sessions."""
    remove_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))  # short, because paths of unix sockets are limited
    (folder / "owner").write_text(str(os.getpid()))
    lab = Lab(folder, **settings)
    try:
        lab.up()
        yield lab
    finally:
        lab.down()
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned() -> None:
    """End the clusters of `temporary_lab` whose process is dead."""
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
