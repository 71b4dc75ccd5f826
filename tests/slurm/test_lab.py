"""The simulated accidents of the test cluster have the effects that their names say, and leave no processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lab import Lab, is_alive, remove_abandoned

from gsdg.sweep import slurm
from gsdg.utils.errors import UserError

pytestmark = pytest.mark.slow
ABANDONED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from lab import free_port_base, temporary_lab
with temporary_lab(nodes=1, port_base=free_port_base(1)) as lab:
    job = lab.submit(script="setsid sleep 600 & trap '' TERM; while :; do sleep 0.2; done")
    lab.wait(lambda: lab.state(job) == "RUNNING")
    lab.kill_slurmd_only(1)  # the processes of the job are orphans now
    print(lab.folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def processes(folder: Path) -> set[int]:
    """All processes with this cluster's configuration, except the tests themselves."""
    wanted, found = f"SLURM_CONF={folder}/etc/slurm.conf".encode(), set()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in environ.read_bytes().split(b"\0"):
                found.add(int(environ.parent.name))
        except OSError:
            continue
    return found - {os.getpid()}


def works(lab: Lab, node: int) -> str:
    job = lab.submit(f"--nodelist=n{node}", "--requeue", script="echo $$ >> $HOME/pids; sleep 600")
    lab.wait(lambda: lab.state(job) == "RUNNING")
    return job


def pids(file: Path) -> list[int]:
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


def test_with_its_slurmd_gone_a_node_is_lost_while_its_job_lives_on(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    job = works(cluster, 1)
    (first,) = cluster.wait(lambda: pids(tmp_path / "pids"))
    cluster.kill_slurmd_only(1, announced=True)
    assert cluster.state(job) == "PENDING"
    assert is_alive(first)
    cluster.return_node(1)
    cluster.wait(lambda: len(pids(tmp_path / "pids")) == 2)
    cluster.wait(lambda: not is_alive(first))


def test_a_node_without_power_takes_its_jobs_along(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    job = works(cluster, 2)
    (first,) = cluster.wait(lambda: pids(tmp_path / "pids"))
    cluster.kill_node(2)
    cluster.wait(lambda: not is_alive(first), 10)
    assert cluster.state(job) == "RUNNING", "SLURM has not noticed"
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=noticed")
    cluster.wait(lambda: cluster.state(job) == "PENDING")


def test_a_controller_that_is_killed_comes_back_with_its_jobs(cluster):
    job = cluster.submit()
    cluster.wait(lambda: cluster.state(job) == "RUNNING")
    cluster.wait(lambda: (cluster.folder / "spool" / "ctld" / "job_state").exists())
    cluster.kill_controller(signal.SIGTERM)
    assert cluster.run("squeue", check=False) == ""
    cluster.start_controller()
    assert cluster.state(job) == "RUNNING"


def test_a_node_for_which_a_job_is_planned_is_up(cluster):
    """As during many preemptions: one node runs a job that cannot be preempted, the others are planned."""
    cluster.submit("--partition=high", "--nodelist=n1")
    cluster.submit("--partition=high", "--exclusive", "--nodes=4")
    cluster.submit("--exclusive", "--nodes=4")
    cluster.wait(lambda: "plnd" in cluster.run("sinfo", "--noheader", "--format=%t"))
    cluster.up()
    assert all(some.up for some in slurm._node_groups())


def test_a_daemon_that_crashes_leaves_no_core_in_the_checkout(cluster):
    for name in ("slurmctld", "slurmd.n1"):
        pid = (cluster.folder / "run" / f"{name}.pid").read_text().strip()
        (limit,) = (line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "core file" in line)
        assert limit.split()[4:6] == ["0", "0"]


def test_settings_can_be_changed_while_it_runs(cluster):
    cluster.configure(user_signal=False, max_array_size=50, max_jobs=20)
    settings = cluster.run("scontrol", "show", "config")
    assert "preempt_send_user_signal" not in settings
    assert "MaxArraySize            = 50" in settings
    with pytest.raises(UserError, match="MaxJobCount"):
        slurm.check_accepted("#!/bin/bash\n#SBATCH --array=0-40\n")
    with pytest.raises(TypeError, match="max_array_size"):
        cluster.configure(max_arrays=3)


def test_the_cluster_of_a_killed_session_is_ended_with_its_orphans_by_the_next(cluster):
    command = [sys.executable, "-c", ABANDONED, str(Path(__file__).parent)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL
    folder = Path(done.stdout.strip())
    assert len(processes(folder)) >= 4
    remove_abandoned()
    assert processes(folder) == set()
    assert not folder.exists()
    assert cluster.folder.exists(), "a living session's is left alone"
    cluster.run("squeue")
