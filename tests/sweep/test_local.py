"""hydra/launcher=local: a sweep on this machine, each run in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import REPOSITORY, SMALL, Launcher, status

pytestmark = pytest.mark.slow
LOCAL = ("-m", "hydra/launcher=local", "hydra.launcher.side_by_side=2", *SMALL)


def states(launch: Launcher) -> list[str]:
    return sorted(status(path.parent)["state"] for path in launch.runs_dir.glob("*/status.json"))


def test_it_ends_with_the_table_and_one_failure_is_an_exit_status(launch):
    sweep = (*LOCAL, "trainer.steps=9", "optimizer=sgd", "optimizer.lr=1e-3,1e30")
    answer = launch(*sweep)
    assert answer.returncode == 1
    assert states(launch) == ["done", "failed"]
    assert "rotated_digits, training_domain" in answer.stdout
    assert "1 run of 2 not done" in answer.stderr
    assert "Traceback" not in answer.stderr
    again = launch(*sweep[:-1], "optimizer.lr=1e-3")
    assert again.returncode == 0, again.stderr
    assert "0 to submit" in again.stdout


def test_ctrl_c_saves_what_runs_and_the_same_command_goes_on(launch):
    """A terminal sends SIGINT to every process of the command."""
    length = ("trainer.steps=600", "trainer.eval_every=300", "trainer.checkpoint_every=2000", "trainer.log_every=1")
    sweep = [*LOCAL, *length, "split.trial_seed=0,1"]
    command = [sys.executable, str(REPOSITORY / "launch.py"), *sweep, f"runs_dir={launch.runs_dir}"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=launch.environment, start_new_session=True, **pipes)
    end = time.monotonic() + 400
    while sum("step 5/" in path.read_text() for path in launch.runs_dir.glob("*/log.txt")) < 2:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "resume from the last checkpoint" in errors
    while "running" in states(launch):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert states(launch) == ["stopped", "stopped"]
    answer = launch(*sweep)
    assert answer.returncode == 0, answer.stderr
    assert states(launch) == ["done", "done"]
    logs = [path.read_text() for path in launch.runs_dir.glob("*/log.txt")]
    assert all("resuming at step" in log for log in logs)
