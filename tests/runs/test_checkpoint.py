"""Checkpoints: whole or not there, damaged ones passed over, every random stream goes on where it stopped."""

from __future__ import annotations

import os
import random
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from gsdg.checkpoint import Checkpoints, Saver, random_states, restore_random_states, save_atomically
from gsdg.runs import RunFolder
from gsdg.signals import Signals, Stopped


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


def test_a_save_that_is_interrupted_leaves_no_rubbish(tmp_path, monkeypatch):
    def interrupted(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, {"x": 0})
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(10, {"x": 1})
    assert os.listdir(tmp_path) == ["step_00000005.pt"]


def test_the_long_write_is_outside_the_fence_and_what_counts_is_inside(tmp_path, monkeypatch):
    inside, seen = [], []

    @contextmanager
    def fence():
        inside.append(True)
        yield
        inside.pop()

    def watch(owner, name, label):
        function = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, **kw: (seen.append((label, bool(inside))), function(*args, **kw))
        )

    for owner, name in ((torch, "save"), (os, "replace"), (type(tmp_path), "unlink"), (type(tmp_path), "mkdir")):
        watch(owner, name, name)
    monkeypatch.setattr("gsdg.checkpoint.KEEP", 0)
    Checkpoints(tmp_path / "made", fence).save(5, {"x": 0})
    assert seen[:3] == [("mkdir", True), ("save", False), ("replace", True)]
    assert ("unlink", True) in seen[3:]


def test_two_processes_never_write_one_temporary_file(tmp_path, monkeypatch):
    opened = []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: (opened.append(file.name), save(state, file)))
    for pid in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        Checkpoints(tmp_path).save(5, {"x": 0})
    assert len(set(opened)) == 2


def test_a_checkpoint_of_an_earlier_version_is_resumed(tmp_path):
    class Part:
        state = "untouched"

        def load_state_dict(self, state):
            self.state = state

    old, new = Part(), Part()
    folder = RunFolder(tmp_path)
    with folder.hold():
        Checkpoints(tmp_path / "checkpoints").save(5, {"random": random_states(), "old": "loaded"})
        assert Saver({"old": old, "new": new}, folder, Signals(), 10).resume() == (5, False)
        folder.set_status()
        assert folder.status["step"] == 5  # not what the killed run had got to
    assert (old.state, new.state) == ("loaded", "untouched")


def test_what_is_not_worth_saving_is_not_saved_for_a_signal(tmp_path):
    """Where the host may not look at every step, a bad one is found at the next report: a checkpoint would hide it."""

    def refuse():
        raise ValueError("not finite")

    folder, signals = RunFolder(tmp_path), Signals()
    with folder.hold(), signals:
        saver = Saver({}, folder, signals, 10)
        saver.begin()
        os.kill(os.getpid(), signal.SIGUSR2)
        with pytest.raises(ValueError, match="not finite"):
            saver.after_step(3, False, refuse)
    assert not list(tmp_path.rglob("*.pt"))


def test_records_are_on_the_disk_before_a_checkpoint_counts_on_them(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(RunFolder, "flush_lines", lambda self: done.append("flushed"))
    monkeypatch.setattr(torch, "save", lambda *args: done.append("saved"))
    folder = RunFolder(tmp_path)
    with folder.hold():
        Saver({}, folder, Signals(), 10).after_step(3, True, None)
    assert done == ["flushed", "saved"]


def test_a_signal_that_was_lost_on_the_way_stops_the_run_before_its_first_step(tmp_path):
    signals = Signals()
    signals.stop = signal.SIGUSR2  # noted, and its exception swallowed, as Python does in a finalizer
    with pytest.raises(Stopped, match="nothing had to be saved"):
        Saver({}, RunFolder(tmp_path), signals, 10).begin()


def test_a_stop_is_saved_for_even_if_its_saving_was_done_a_step_before(tmp_path):
    """A signal may come between the two questions: it is then saved for at once, and obeyed at the next step."""
    folder, signals = RunFolder(tmp_path), Signals()
    signals.stop = signal.SIGUSR2
    with folder.hold(), pytest.raises(Stopped, match="saved after 3 of 10"):
        Saver({}, folder, signals, 10).after_step(3, False, lambda: None)
    assert Checkpoints(tmp_path / "checkpoints").load_latest()["step"] == 3
