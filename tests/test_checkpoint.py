"""Checkpoints: whole or not there, damaged ones passed over, every random stream goes on where it stopped."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from gsdg.checkpoint import Checkpoints, random_states, restore_random_states, save_atomically


def draw() -> list:
    return [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]


def test_every_random_stream_goes_on_where_it_stopped(tmp_path):
    draw()
    save_atomically(tmp_path / "states.pt", random_states())
    expected = draw()
    torch.manual_seed(9), np.random.seed(9), random.seed(9)
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert draw() == expected


def test_the_last_two_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (5, 10, 100):
        checkpoints.save(step, {"x": torch.tensor(step)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010.pt", "step_00000100.pt"]
    assert checkpoints.load_latest()["x"] == 100


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(b""), lambda p: p.write_bytes(p.read_bytes()[:200])])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, damage, caplog):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, {"x": torch.arange(100)})
    checkpoints.save(10, {"x": torch.arange(100)})
    damage(tmp_path / "step_00000010.pt")
    assert checkpoints.load_latest()["step"] == 5
    assert "step_00000010.pt" in caplog.text
    assert "trying the one before" in caplog.text


def test_without_a_readable_checkpoint_there_is_none(tmp_path):
    assert Checkpoints(tmp_path / "none").load_latest() is None


def test_a_full_disk_leaves_the_old_checkpoint_and_no_rubbish(disk):
    checkpoints = Checkpoints(disk)
    checkpoints.save(5, {"x": torch.zeros(100)})
    with pytest.raises(OSError, match=r"could not write .*step_00000010\.pt.*\n.*intact") as error:
        checkpoints.save(10, {"x": torch.zeros(2_000_000)})
    assert "free some space" in str(error.value)
    assert os.listdir(disk) == ["step_00000005.pt"]
    assert checkpoints.load_latest()["step"] == 5
