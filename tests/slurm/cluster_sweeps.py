"""What the tests of sweeps on the cluster share: small sweeps from a process of their own, and what they leave."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import torch
from helpers import REPOSITORY, records_without_time, status
from lab import HALF_A_NODE, Lab

# A run of some ten seconds on one core, with everything that is drawn; interrupted ones repeat 25 steps at most.
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
HOLD = "+hydra.launcher.additional_parameters.hold=true"  # jobs may be over before the command that submits them is


class Sweeps:
    """`python launch.py -m ...` and `python -m gsdg.sweep ...` with their runs in one folder, against a cluster."""

    def __init__(self, lab: Lab | None, runs_dir: Path, checkout: Path = REPOSITORY) -> None:
        self.lab, self.runs_dir, self.checkout = lab, runs_dir, checkout
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **(lab.environment if lab else {})}

    def launch(self, *overrides: str, check: bool = True) -> subprocess.CompletedProcess:
        """Submit a sweep."""
        return self._python(
            str(self.checkout / "launch.py"), "-m", *HALF_A_NODE, *overrides, f"runs_dir={self.runs_dir}", check=check
        )

    def command(self, verb: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        return self._python("-m", "gsdg.sweep", verb, *arguments, f"--runs-dir={self.runs_dir}", check=check)

    def _python(self, *arguments: str, check: bool) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.checkout,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    # ---- what is on disk ------------------------------------------------------------------------------------------

    @property
    def runs(self) -> list[Path]:
        return sorted(path.parent for path in self.runs_dir.glob("*/status.json"))

    def states(self) -> list[str]:
        return sorted(status(run)["state"] for run in self.runs)

    def steps(self) -> list[int]:
        return [status(run).get("step") or 0 for run in self.runs]

    def log(self) -> str:
        """All that the runs have logged."""
        return "".join(path.read_text() for path in sorted(self.runs_dir.glob("*/log.txt")))

    def started(self) -> dict[str, float]:
        """When each run's process was started, by its task's log: {run id: seconds since the epoch}."""
        found = re.findall(r"^(\S+ \S+) INFO run (\w+) starts as process", self.task_logs(), re.MULTILINE)
        return {run_id: datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f").timestamp() for when, run_id in found}

    def task_logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.runs_dir.glob(".sweeps/*/jobs/*.out")))

    def wait_for_step(self, step: int, seconds: float = 180) -> None:
        """Until a run has logged that it did `step` steps (its status lags by a heartbeat)."""
        marks = [f"step {n}/" for n in range(step, step + 200)]
        self.lab.wait(lambda: any(mark in self.log() for mark in marks), seconds)

    def release(self) -> None:
        """Let what was submitted with HOLD start."""
        self.lab.run("scontrol", "release", *self.lab.states())

    def wait_until_over(self, seconds: float = 300) -> None:
        self.lab.wait(lambda: not self.lab.states(), seconds)


def same_result(one: Path, other: Path) -> None:
    """Two runs have equal records, but for times, and equal weights."""
    assert status(one)["state"] == status(other)["state"] == "done"
    assert records_without_time(one) == records_without_time(other)
    weights, again = (torch.load(run / "model.pt", weights_only=True) for run in (one, other))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
