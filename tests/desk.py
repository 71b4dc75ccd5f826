"""Sweeps as they lie on disk, made by hand for the tests of what is read from there."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from helpers import REPOSITORY

from gsdg.sweep.folder import Frozen, SweepFolder

HERE = socket.gethostname()
FIRST = "2026-01-01_10-00-00-111111"


def config(target: str = "sketch", **more: object) -> dict:
    """As a run's, but for what no test here looks at; `algorithm__alpha=0.3` sets a key of a group."""
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


class Desk:
    """A runs_dir and how to fill it. `ago`: seconds before now."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self.now = time.time()
        self.processes: list[subprocess.Popen] = []

    def sweep(self, runs: Sequence[str | Frozen], name: str = FIRST) -> SweepFolder:
        sweep = SweepFolder(self.runs_dir / ".sweeps" / name)
        sweep.write({}, [run if isinstance(run, Frozen) else Frozen(run, [], config()) for run in runs])
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
    ) -> str:
        """The array's name. jobs: None, nobody noted them; the launching process died first."""
        array = f"gsdg-{sweep.name}-{number}"
        sweep.append("submitted", time=self.now - ago, cluster=cluster, array=array, packs=packs)
        if jobs:
            sweep.append("accepted", time=self.now - ago + 1, array=array, jobs=jobs, host=host)
        return array

    def process(self, code: str, *arguments: str) -> subprocess.Popen:
        """A Python that says a line when it is ready; it is ended with the test."""
        command = [sys.executable, "-u", "-c", code, *arguments]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        process.stdout.readline()
        return process

    def working(self, run_id: str) -> subprocess.Popen:
        """A real process that holds the run."""
        code = (
            "import sys, time; from pathlib import Path; from gsdg.runs import RunFolder\n"
            "with RunFolder(Path(sys.argv[1])).hold(): print('ready'); time.sleep(600)"
        )
        return self.process(code, str(self.runs_dir / run_id))

    def clear(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
