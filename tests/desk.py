"""Writes sweeps and run folders by hand, for the tests that read them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from helpers import REPOSITORY

from gsdg.sweep.folder import FrozenRun, SweepFolder

HERE = socket.gethostname()
FIRST = "2026-01-01_10-00-00-111111"


def config(target: str = "sketch", **more: object) -> dict:
    """The keys of a run's config that the tests here need; `algorithm__alpha=0.3` sets a key of a group."""
    made = {
        "seed": 0,
        "dataset": {"name": "digits"},
        "split": {"target": [target], "trial_seed": 0},
        "model": {"name": "convnet", "image_size": 28},
        "algorithm": {"name": "erm", "_target_": "ERM"},
        "trainer": {
            "steps": 100,
            "eval_every": 10,
            "evaluate_last": True,
            "batch_size": 8,
            "precision": "float32",
            "transform": "exact",
        },
    }
    for key, value in more.items():
        group, _, leaf = key.partition("__") if "__" in key else ("", "", key)
        (made[group] if group else made)[leaf] = value
    return made


def script(sweep: SweepFolder, array: str) -> Path:
    """Where the batch script of an array is, as submitit names it."""
    return sweep.jobs / f".submission_file_{array}.sh"


class Desk:
    """A runs_dir, and methods that fill it. `ago`: seconds before now."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self.now = time.time()
        self.processes: list[subprocess.Popen] = []
        self.submissions = 0

    def sweep(self, runs: Sequence[str | FrozenRun], name: str = FIRST) -> SweepFolder:
        sweep = SweepFolder(self.runs_dir / ".sweeps" / name)
        sweep.write({}, [run if isinstance(run, FrozenRun) else FrozenRun(run, [], config()) for run in runs])
        return sweep

    def run(self, run_id: str, state: str, *, ago: float = 0.0, **more: object) -> Path:
        """A run's folder with its status."""
        folder = self.runs_dir / run_id
        folder.mkdir(parents=True, exist_ok=True)
        status = {"state": state, "heartbeat": self.now - ago, "host": "elsewhere", "pid": 1, **more}
        (folder / "status.json").write_text(json.dumps(status))
        return folder

    def submitted(
        self,
        sweep: SweepFolder,
        packs: list[list[str]],
        *,
        ago: float = 500.0,
        jobs: list[str] | None = None,
        cluster: str = "slurm",
        host: str = HERE,
        number: int = 0,
        done_before: Sequence[str] = (),
    ) -> str:
        """Note a submission; returns the array's name. The order of the submissions is that of the calls.

        jobs: job numbers; None: the launching process died before it noted them, and left the batch script `script`.
        """
        array, self.submissions = f"gsdg-{sweep.name}-{number}", self.submissions + 1
        where = {"cluster": cluster, "array": array, "packs": packs}
        sweep.append("submitted", time=self.now - ago, order=self.submissions, done_before=done_before, **where)
        if cluster == "slurm":
            sweep.jobs.mkdir(exist_ok=True)
            script(sweep, array).write_text(
                f"#!/bin/bash\n\n# setup\n# gsdg submits: {array}\nexport X=1\n\nsrun true\n"
            )
        if jobs:
            sweep.append("accepted", time=self.now - ago + 1, array=array, jobs=jobs, host=host)
        return array

    def process(self, code: str, *arguments: str) -> subprocess.Popen:
        """Start a Python process, and wait until it prints a line; `clear` ends it."""
        command = [sys.executable, "-u", "-c", code, *arguments]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        process.stdout.readline()
        return process

    def working(self, run_id: str) -> subprocess.Popen:
        """A real process that holds the lock of the run's folder."""
        code = (
            "import sys, time; from pathlib import Path; from gsdg.runs.folder import RunFolder\n"
            "with RunFolder(Path(sys.argv[1])).acquire(): print('ready'); time.sleep(600)"
        )
        return self.process(code, str(self.runs_dir / run_id))

    def clear(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
