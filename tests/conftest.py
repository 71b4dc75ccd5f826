"""Shared by all tests: where the real PACS images are, configs composed in the process, runs through launch.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: small networks only lose time to more

import pytest
from helpers import REPOSITORY, Launcher
from omegaconf import DictConfig


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "slow: more than a few seconds; left out of `make check`")


@pytest.fixture(scope="session")
def pacs_root() -> Path:
    """The folder that holds PACS/: $GSDG_TEST_PACS's parent, or ../shared/data beside the checkout."""
    root = Path(os.environ.get("GSDG_TEST_PACS", REPOSITORY.parent / "shared" / "data" / "PACS"))
    if not root.is_dir():
        pytest.skip(f"real PACS images are not at {root} (set GSDG_TEST_PACS)")
    return root.parent


@pytest.fixture
def disk(tmp_path):
    """A real file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here (needs root)")
    yield place
    subprocess.run(["umount", "--recursive", str(place)], check=True)


@pytest.fixture(autouse=True)
def nothing_global_is_left_behind():
    """A run in this process switches torch's determinism on: for itself, not for the tests after it."""
    yield
    torch = sys.modules.get("torch")
    if torch:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def compose(tmp_path):
    """The config of `python launch.py <overrides>`, with its runs in a temporary folder."""
    import hydra

    def compose(*overrides: str) -> DictConfig:
        with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            return hydra.compose("config", [f"runs_dir={tmp_path / 'runs'}", *overrides])

    return compose


@pytest.fixture
def launch(tmp_path) -> Launcher:
    return Launcher(tmp_path / "runs")
