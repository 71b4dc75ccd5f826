"""One run and one accident on a real cluster: records and weights equal those of an undisturbed run."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cluster_sweeps import HOLD, RUN, Sweeps
from helpers import Launcher, assert_same, only_run, status
from lab import Lab, is_alive, process_state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of the same run on this machine, without a cluster."""
    desk = Launcher(tmp_path_factory.mktemp("desk") / "runs")
    answer = desk(*RUN)
    assert answer.returncode == 0, answer.stderr
    return only_run(desk.runs_dir)


@pytest.fixture
def sweeps(cluster, tmp_path) -> Sweeps:
    return Sweeps(cluster, tmp_path / "runs")


@contextmanager
def caught(sweeps: Sweeps, *overrides: str) -> Iterator[str]:
    """The job of a sweep of one run that is stopped (SIGSTOP) after some 60 steps, between two writes; then it goes on.

    So the accident meets it in the middle. SLURM sends SIGCONT when it ends a job: the 340 steps that are left must
    then take longer than KillWait, 2 s (here some 8 s).
    """
    sweeps.launch(*RUN, *overrides)
    sweeps.wait_for_step(60)
    (job,), (run,) = sweeps.lab.states(), sweeps.runs
    pid = status(run)["pid"]
    stop(pid)
    while is_writing(run):
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)
        stop(pid)
    try:
        yield job
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    while (state := process_state(pid)) != "T":
        assert state not in ("", "Z"), "the run ended before it could be stopped"
        time.sleep(0.01)


def is_writing(run: Path) -> bool:
    """Whether a process holds the run's guard: if it were stopped there, no other process could write."""
    with (run / ".guard").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def asked_to_stop(sweeps: Sweeps) -> bool:
    return "asked to stop" in sweeps.task_logs()


def resumed_once(sweeps: Sweeps) -> bool:
    return sweeps.log().count("resuming at step") == 1


def test_undisturbed(sweeps, undisturbed):
    sweeps.launch(*RUN)
    sweeps.wait_until_over()
    assert_same(undisturbed, *sweeps.runs)


def test_requeued_by_hand(sweeps, undisturbed):
    with caught(sweeps) as job:
        sweeps.lab.run("scontrol", "requeue", job)
    sweeps.wait_until_over()
    assert resumed_once(sweeps)
    assert_same(undisturbed, *sweeps.runs)


@pytest.mark.parametrize("user_signal", [True, False], ids=["with USR2", "TERM then KILL"])
def test_preempted(sweeps, undisturbed, user_signal):
    """A job of partition high wants its node: with USR2 the run saves and asks to be queued again, or SLURM does."""
    lab: Lab = sweeps.lab
    lab.configure(user_signal=user_signal, grace_time=60 if user_signal else 0)
    with caught(sweeps) as job:
        high = ("--partition=high", "--exclusive", f"--nodelist=n{lab.node_of(job)}", "--mem=0")
        above = lab.submit(*high, script="sleep 3")
        lab.wait(lambda: asked_to_stop(sweeps) if user_signal else lab.state(above) == "RUNNING")
    sweeps.wait_until_over()
    assert asked_to_stop(sweeps) == user_signal
    assert resumed_once(sweeps)
    assert_same(undisturbed, *sweeps.runs)


def test_its_node_loses_power(sweeps, undisturbed):
    with caught(sweeps) as job:
        sweeps.lab.kill_node(sweeps.lab.node_of(job), announced=True)
    sweeps.wait_until_over()
    assert resumed_once(sweeps)
    assert_same(undisturbed, *sweeps.runs)


def test_the_orphan_of_a_lost_node_stops_and_the_new_copy_goes_on(sweeps, undisturbed):
    """Only slurmd dies: SLURM starts the task on another node while the old process is alive and still writing."""
    with caught(sweeps) as job:
        (run,) = sweeps.runs
        orphan = status(run)["pid"]
        sweeps.lab.kill_slurmd_only(sweeps.lab.node_of(job), announced=True)
        sweeps.lab.wait(lambda: status(run)["pid"] != orphan)
    sweeps.lab.wait(lambda: not is_alive(orphan))
    assert "was taken over" in sweeps.task_logs()
    sweeps.wait_until_over()
    assert_same(undisturbed, run)


def test_out_of_time_it_saves_and_comes_back(sweeps, undisturbed):
    """With a limit of one minute; SLURM signals before its end. No regular checkpoint is due before that."""
    limit = ("hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=11")
    with caught(sweeps, "trainer.checkpoint_every=100000", *limit):
        sweeps.lab.wait(lambda: asked_to_stop(sweeps))
    sweeps.wait_until_over()
    assert "this job is timed-out" in sweeps.task_logs()
    assert "resuming at step" in sweeps.log()  # on a busy machine more than once
    assert_same(undisturbed, *sweeps.runs)


def test_cancelled_by_scancel_its_status_says_so_and_the_same_command_finishes_it(sweeps, undisturbed):
    with caught(sweeps) as job:
        sweeps.lab.run("scancel", job)
    sweeps.wait_until_over()
    answer = sweeps.command("status", check=False)
    assert answer.returncode == 1
    assert "lost" in answer.stdout
    assert "ancelled" in answer.stdout
    sweeps.launch(*RUN)
    sweeps.wait_until_over()
    assert_same(undisturbed, *sweeps.runs)


def test_killed_by_the_kernel_as_when_memory_runs_out(sweeps, undisturbed):
    with caught(sweeps):
        (run,) = sweeps.runs
        os.kill(status(run)["pid"], signal.SIGKILL)
    sweeps.wait_until_over()
    assert status(run)["state"] == "failed"
    assert "SIGKILL" in status(run)["reason"]
    sweeps.launch(*RUN)
    sweeps.wait_until_over()
    assert_same(undisturbed, run)


def test_over_its_memory_limit_slurm_ends_all_of_it_and_status_says_why(sweeps):
    sweeps.launch(*RUN, "trainer.batch_size=3000", "hydra.launcher.mem_gb=null", "hydra.launcher.mem_per_cpu=300M")
    sweeps.wait_until_over()
    answer = sweeps.command("status", check=False)
    assert answer.returncode == 1
    assert "memory" in answer.stdout


def test_an_exception_is_a_failed_run_and_a_failed_task(sweeps):
    sweeps.launch(*RUN, "optimizer=sgd", "optimizer.lr=1e30", HOLD)
    (job,) = sweeps.lab.states()
    sweeps.release()
    sweeps.wait_until_over()
    assert sweeps.states() == ["failed"]
    assert sweeps.lab.state(job) == "FAILED"
    answer = sweeps.command("status", check=False)
    assert answer.returncode == 1
    assert "NonFinite" in answer.stdout


def test_the_controller_dies_and_comes_back(sweeps, undisturbed):
    with caught(sweeps):
        sweeps.lab.kill_controller()
        sweeps.lab.start_controller()
    sweeps.wait_until_over()
    assert_same(undisturbed, *sweeps.runs)
