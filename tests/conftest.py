"""Shared by all tests: where the real PACS images are, small runs through launch.py, comparison of run folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
DIGITS = ("split.target=15", "model=convnet", "trainer.workers=0", "trainer.batch_size=8", "device=cpu")


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "slow: more than a few seconds; left out of `make check`")


@pytest.fixture(scope="session")
def pacs_root() -> Path:
    """The folder that holds PACS/: $GSDG_TEST_PACS's parent, or ../shared/data beside the checkout."""
    root = Path(os.environ.get("GSDG_TEST_PACS", REPOSITORY.parent / "shared" / "data" / "PACS"))
    if not root.is_dir():
        pytest.skip(f"real PACS images are not at {root} (set GSDG_TEST_PACS)")
    return root.parent


class Launcher:
    """`python launch.py ...` in a process of its own, as a user runs it, with its runs in a temporary folder."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir

    def command(self, *overrides: str) -> list[str]:
        return [sys.executable, str(REPOSITORY / "launch.py"), f"runs_dir={self.runs_dir}", *overrides]

    def __call__(self, *overrides: str, **kwargs) -> subprocess.CompletedProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})}
        environment = {key: value for key, value in environment.items() if key != "HYDRA_FULL_ERROR"} | kwargs
        return subprocess.run(
            self.command(*overrides), cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600
        )

    def folder(self) -> Path:
        """The one run that was made."""
        (config,) = self.runs_dir.glob("*/config.json")
        return config.parent


@pytest.fixture
def launch(tmp_path) -> Launcher:
    return Launcher(tmp_path / "runs")


def records_without_time(folder: Path) -> list[dict]:
    """A run's records but for what the wall clock wrote."""
    lines = (folder / "records.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]
