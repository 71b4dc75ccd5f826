"""A small version of benchmarks/chaos_slurm.py: each kind of accident once, at random, and nothing is lost."""

from __future__ import annotations

import random
import sys

import pytest
from helpers import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from chaos_slurm import trial  # noqa: E402


@pytest.mark.slow
def test_a_sweep_survives_a_bad_night(cluster, tmp_path):
    """Random preemptions, requeues, cancellations, lost nodes and killed daemons change no record and no weight."""
    seed = random.randrange(1000)
    lines, faults = trial(cluster, tmp_path, runs=12, steps=100, seconds=20, seed=seed)
    print(*lines, sep="\n")
    assert not faults
