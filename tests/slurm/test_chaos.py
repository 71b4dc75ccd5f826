"""A small version of benchmarks/chaos_slurm.py: accidents at random for a minute, and nothing is lost."""

from __future__ import annotations

import random
import sys

import pytest
from helpers import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from chaos_slurm import trial  # noqa: E402


@pytest.mark.slow
def test_a_sweep_survives_a_bad_night(cluster, tmp_path):
    """Preempted, requeued, cancelled, nodes lost and orphaned, controller and launcher killed: equal to a quiet one."""
    seed = random.randrange(1000)
    lines, faults = trial(cluster, tmp_path, runs=12, steps=100, seconds=60, seed=seed)
    print(*lines, sep="\n")
    assert not faults
