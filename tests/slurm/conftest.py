"""The SLURM cluster of the tests: four pretend nodes, started once, reset before each test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from lab import SETTINGS, Lab, missing, temporary_lab  # noqa: E402


@pytest.fixture(scope="session")
def cluster() -> Iterator[Lab]:
    """A running cluster of the nodes n1 to n4; the client commands use it during the test."""
    if why := missing():
        pytest.skip(why)
    with temporary_lab(nodes=4) as lab:
        yield lab


@pytest.fixture(autouse=True)
def clients_talk_to_the_cluster(request, monkeypatch) -> Iterator[None]:
    """Resets jobs, lost nodes and settings after each test."""
    if "cluster" not in request.fixturenames:
        yield
        return
    lab = request.getfixturevalue("cluster")
    for name, value in lab.environment.items():
        monkeypatch.setenv(name, value)
    yield
    lab.clear()
    changed = {name: value for name, value in SETTINGS.items() if lab.settings[name] != value}
    if changed:
        lab.configure(**changed)
