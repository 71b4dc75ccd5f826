"""What several tests use: configs and launches of small runs, and what a run folder holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# Overrides that make a run on the embedded digits take a second or two.
SMALL = ("split.target=15", "trainer.workers=0", "trainer.batch_size=4", "trainer.eval_every=8", "device=cpu")


class Launcher:
    """`python launch.py <overrides>` in a process of its own, with its runs in a folder of the test's."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.environment.pop("HYDRA_FULL_ERROR", None)

    def start(self, *overrides: str) -> subprocess.Popen:
        return self.start_as_given(*overrides, f"runs_dir={self.runs_dir}")

    def start_as_given(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, str(REPOSITORY / "launch.py"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.runs_dir.parent, env=self.environment, **pipes)

    def __call__(self, *overrides: str) -> subprocess.CompletedProcess:
        return self._answer(self.start(*overrides))

    def run_as_given(self, *arguments: str) -> subprocess.CompletedProcess:
        """Without a runs_dir: that is for a preset to say."""
        return self._answer(self.start_as_given(*arguments))

    def _answer(self, process: subprocess.Popen) -> subprocess.CompletedProcess:
        output, errors = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def only_run(runs_dir: Path) -> Path:
    """The folder of the one run in `runs_dir`."""
    (config,) = Path(runs_dir).glob("*/config.json")
    return config.parent


def records_without_time(folder: Path) -> list[dict]:
    """A run's records but for what the wall clock wrote."""
    lines = (folder / "records.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def photos(root: Path, *, domains: str = "abc", classes: str = "xy", each: int = 6, size: int = 48) -> Path:
    """A folder tree of small colour images, no two alike."""
    import numpy as np
    from PIL import Image

    random = np.random.RandomState(0)
    for domain in domains:
        for label in classes:
            (root / domain / label).mkdir(parents=True, exist_ok=True)
            for i in range(each):
                coarse = random.randint(0, 256, (5, 7, 3)).astype(np.uint8)
                image = Image.fromarray(coarse).resize((size + i, size), Image.Resampling.BICUBIC)
                image.save(root / domain / label / f"{i}.png")
    return root
