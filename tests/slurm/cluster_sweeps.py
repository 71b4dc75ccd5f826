"""Shared by the tests of sweeps on the cluster: launches small sweeps as processes, and reads their results."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from helpers import REPOSITORY, status
from lab import HALF_A_NODE, Lab

# A run of about ten seconds on one core that uses all random number generators; an interrupted one repeats at most 25
# steps.
RUN = (
    "split.target=15",
    "trainer.workers=0",
    "trainer.batch_size=4",
    "trainer.steps=400",
    "trainer.eval_every=100",
    "trainer.checkpoint_every=25",
    "trainer.log_every=5",
    "model.dropout=0.3",
    "optimizer.lr=1e-3",
    "device=cpu",
)
HOLD = "+hydra.launcher.additional_parameters.hold=true"  # else jobs may be over before the command that submits them


class Sweeps:
    """`python launch.py -m ...` and `python -m gsdg.sweep ...` against a cluster, with all runs in one folder."""

    def __init__(self, lab: Lab | None, runs_dir: Path, checkout: Path = REPOSITORY) -> None:
        self.lab, self.runs_dir, self.checkout = lab, runs_dir, checkout
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **(lab.environment if lab else {})}

    def launch(self, *overrides: str, check: bool = True) -> subprocess.CompletedProcess:
        """Submit a sweep."""
        launch = (str(self.checkout / "launch.py"), "-m", *HALF_A_NODE)
        return self._python(*launch, *overrides, f"runs_dir={self.runs_dir}", check=check)

    def command(self, verb: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        return self._python("-m", "gsdg.sweep", verb, *arguments, f"--runs-dir={self.runs_dir}", check=check)

    def _python(self, *arguments: str, check: bool) -> subprocess.CompletedProcess:
        where = {"cwd": self.checkout, "env": self.environment}
        done = subprocess.run([sys.executable, *arguments], **where, capture_output=True, text=True, timeout=600)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    # ---- what is on disk ------------------------------------------------------------------------------------------

    @property
    def runs(self) -> list[Path]:
        return sorted(path.parent for path in self.runs_dir.glob("*/status.json"))

    def states(self) -> list[str]:
        return sorted(status(run)["state"] for run in self.runs)

    def log(self) -> str:
        """The logs of all runs."""
        return "".join(path.read_text() for path in sorted(self.runs_dir.glob("*/log.txt")))

    def started(self) -> dict[str, float]:
        """When each run's process was started, by its task's log: {run id: seconds since the epoch}."""
        starts = re.findall(r"^(\S+ \S+) INFO run (\w+) starts as process", self.task_logs(), re.MULTILINE)
        return {run_id: datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f").timestamp() for when, run_id in starts}

    def task_logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.runs_dir.glob(".sweeps/*/jobs/*.out")))

    def wait_for_step(self, step: int, seconds: float = 180) -> None:
        """Wait until a run has logged `step` steps (its status lags by up to a heartbeat)."""
        marks = [f"step {n}/" for n in range(step, step + 200)]
        self.lab.wait(lambda: any(mark in self.log() for mark in marks), seconds)

    def release(self) -> None:
        """Release the jobs that were submitted with HOLD."""
        self.lab.run("scontrol", "release", *self.lab.states())

    def wait_until_over(self, seconds: float = 300) -> None:
        self.lab.wait(lambda: not self.lab.states(), seconds)
