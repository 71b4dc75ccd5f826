"""One run, one accident: on a real cluster it ends with the records and weights of a run that nothing happened to."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from cluster_sweeps import RUN, Sweeps, same_result
from helpers import Launcher, only_run, status
from lab import Lab

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of the run at the desk."""
    desk = Launcher(tmp_path_factory.mktemp("desk") / "runs")
    answer = desk(*RUN)
    assert answer.returncode == 0, answer.stderr
    return only_run(desk.runs_dir)


@pytest.fixture
def sweeps(cluster, tmp_path) -> Sweeps:
    return Sweeps(cluster, tmp_path / "runs")


def started(sweeps: Sweeps) -> str:
    """The job of the sweep's only task, once its run has made some steps."""
    sweeps.launch(*RUN)
    sweeps.wait_for_step(60)
    (job,) = sweeps.lab.states()
    return job


def resumed_once(sweeps: Sweeps) -> bool:
    return sweeps.log().count("resuming at step") == 1


def test_undisturbed(sweeps, undisturbed):
    sweeps.launch(*RUN)
    sweeps.wait_until_over()
    same_result(undisturbed, *sweeps.runs)


def test_requeued_by_hand(sweeps, undisturbed):
    sweeps.lab.run("scontrol", "requeue", started(sweeps))
    sweeps.wait_until_over()
    assert resumed_once(sweeps)
    same_result(undisturbed, *sweeps.runs)


@pytest.mark.parametrize("user_signal", [True, False], ids=["with USR2", "TERM then KILL"])
def test_preempted(sweeps, undisturbed, user_signal):
    """Partition high takes every core: with USR2 the run saves and asks to be queued again, without it SLURM does."""
    sweeps.lab.configure(user_signal=user_signal, grace_time=10 if user_signal else 0)
    started(sweeps)
    for _ in range(sweeps.lab.nodes):
        sweeps.lab.submit("--partition=high", "--exclusive", "--nodes=1", "--mem=0", script="sleep 12")
    sweeps.lab.wait(lambda: list(sweeps.lab.states().values()).count("RUNNING") >= sweeps.lab.nodes, 60)
    sweeps.wait_until_over()
    assert resumed_once(sweeps)
    same_result(undisturbed, *sweeps.runs)


def test_its_node_loses_power(sweeps, undisturbed):
    node = sweeps.lab.node_of(started(sweeps))
    sweeps.lab.kill_node(node, told=True)
    sweeps.wait_until_over()
    assert resumed_once(sweeps)
    same_result(undisturbed, *sweeps.runs)


def test_the_orphan_of_a_lost_node_stops_and_the_new_copy_goes_on(sweeps, undisturbed):
    """Only slurmd dies: SLURM starts the task elsewhere while the old process still trains."""
    node = sweeps.lab.node_of(started(sweeps))
    (run,) = sweeps.runs
    orphan = status(run)["pid"]
    sweeps.lab.kill_slurmd_only(node, told=True)
    sweeps.lab.wait(lambda: status(run)["pid"] != orphan, 60)
    sweeps.lab.wait(lambda: not Path(f"/proc/{orphan}").exists(), 30)
    assert "was taken over" in sweeps.task_logs()
    sweeps.wait_until_over()
    same_result(undisturbed, run)


def test_out_of_time_it_saves_and_comes_back(sweeps, tmp_path):
    """A limit of one minute: SLURM signals some time before it. No checkpoint is due before the end."""
    slow = (*RUN, "trainer.checkpoint_every=100000", "trainer.steps=1200", "trainer.eval_every=600")
    limit = ("hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=11")
    whole = Sweeps(sweeps.lab, tmp_path / "whole")
    whole.launch(*slow, "hydra.launcher.timeout_min=10")
    sweeps.launch(*slow, *limit)
    sweeps.wait_until_over(400)
    assert "resuming at step" in sweeps.log()
    assert "this job is timed-out" in sweeps.task_logs()
    same_result(*whole.runs, *sweeps.runs)


def test_cancelled_by_scancel_its_status_says_so_and_the_same_command_finishes_it(sweeps, undisturbed):
    sweeps.lab.run("scancel", started(sweeps))
    sweeps.wait_until_over()
    answer = sweeps.command("status", check=False)
    assert answer.returncode == 1
    assert "lost" in answer.stdout
    assert "ancelled" in answer.stdout
    sweeps.launch(*RUN)
    sweeps.wait_until_over()
    same_result(undisturbed, *sweeps.runs)


def test_killed_by_the_kernel_as_when_memory_runs_out(sweeps, undisturbed):
    started(sweeps)
    (run,) = sweeps.runs
    os.kill(status(run)["pid"], signal.SIGKILL)
    sweeps.wait_until_over()
    assert status(run)["state"] == "failed"
    assert "SIGKILL" in status(run)["reason"]
    sweeps.launch(*RUN)
    sweeps.wait_until_over()
    same_result(undisturbed, run)


def test_over_its_memory_limit_slurm_ends_all_of_it_and_status_says_why(sweeps):
    sweeps.launch(*RUN, "trainer.batch_size=3000", "hydra.launcher.mem_gb=null", "hydra.launcher.mem_per_cpu=300M")
    sweeps.wait_until_over()
    answer = sweeps.command("status", check=False)
    assert answer.returncode == 1
    assert "memory" in answer.stdout


def test_an_exception_is_a_failed_run_and_a_failed_task(sweeps):
    sweeps.launch(*RUN, "optimizer=sgd", "optimizer.lr=1e30")
    jobs = list(sweeps.lab.states())
    sweeps.wait_until_over()
    assert sweeps.states() == ["failed"]
    assert [sweeps.lab.state(job) for job in jobs] == ["FAILED"]
    answer = sweeps.command("status", check=False)
    assert answer.returncode == 1
    assert "NonFinite" in answer.stdout


def test_the_controller_dies_and_comes_back(sweeps: Sweeps, undisturbed):
    started(sweeps)
    lab: Lab = sweeps.lab
    lab.kill_controller()
    lab.start_controller()
    sweeps.wait_until_over()
    same_result(undisturbed, *sweeps.runs)
