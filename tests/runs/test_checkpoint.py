"""Checkpoints are written completely or not at all, damaged ones are skipped, every RNG state is restored."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPOSITORY

from gsdg.runs.checkpoint import Checkpoints, random_states, restore_random_states, save_atomically
from gsdg.runs.disk import NotWritten
from gsdg.runs.folder import RunFolder
from gsdg.runs.saver import Saver
from gsdg.utils.errors import UserError
from gsdg.utils.stop_signals import Signals, Stopped


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def saver(folder: RunFolder, signals: Signals | None = None, **parts: object) -> Saver:
    """The saver of a run of 10 steps."""
    return Saver(parts, folder, signals or Signals(), 10)


def draw() -> list:
    return [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]


def test_every_rng_state_is_restored(tmp_path):
    draw()
    save_atomically(tmp_path / "states.pt", random_states())
    expected = draw()
    torch.manual_seed(9), np.random.seed(9), random.seed(9)
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert draw() == expected


def test_the_last_two_are_kept(tmp_path):
    assert Checkpoints(tmp_path / "none").load_latest() is None
    checkpoints = Checkpoints(tmp_path)
    for step in (5, 10, 100):
        checkpoints.save(step, {"x": torch.tensor(step)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010.pt", "step_00000100.pt"]
    assert checkpoints.load_latest()["x"] == 100


def flip_a_bit(path: Path) -> None:
    """In the middle of a tensor: torch.load does not notice it."""
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(100).numpy().tobytes()) + 400] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one bit": flip_a_bit,
    "of another kind": lambda path: torch.save([1, 2], path),
    "a Python object": lambda path: torch.save({"step": 10, "x": Path("x")}, path),  # unpickling it could run any code
}


@pytest.fixture
def two(tmp_path) -> Checkpoints:
    """Checkpoints of steps 5 and 10."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (5, 10):
        checkpoints.save(step, {"x": torch.arange(100)})
    return checkpoints


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_renamed_and_the_one_before_it_is_loaded(two, damage, caplog):
    DAMAGE[damage](two.path(10))
    state = two.load_latest()
    assert (state["step"], state["x"].tolist()) == (5, list(range(100)))
    assert sorted(os.listdir(two.folder)) == ["step_00000005.pt", "step_00000010.pt.damaged"]
    assert f"{two.path(10)} (" in caplog.text
    assert "is damaged: " in caplog.text


def test_if_every_checkpoint_is_damaged_the_run_is_refused_each_time(two):
    for step in (5, 10):
        DAMAGE["truncated"](two.path(step))
    for _ in range(2):
        message = r"every checkpoint of run .* is damaged: step_00000005.*step_00000010.*(.|\n)*force=true"
        with pytest.raises(UserError, match=message):
            two.load_latest()
        assert sorted(os.listdir(two.folder)) == ["step_00000005.pt.damaged", "step_00000010.pt.damaged"]


def failing(path: Path) -> None:
    """Linux opens this file, and reading its beginning is a real EIO, as from a failing disk."""
    path.rename(path.with_suffix(".whole"))
    path.symlink_to("/proc/self/mem")


def test_a_failing_disk_ends_the_run_and_loses_nothing(tmp_path, two, folder):
    with folder.acquire():
        for step in range(12):
            folder.append_record({"step": step})
    before = (tmp_path / "records.jsonl").read_bytes()
    for steps in ((10,), (5, 10)):
        for step in steps:
            failing(two.path(step))
        message = r"step_00000010\.pt cannot be read: Input/output error(.|\n)*nothing was changed"
        with folder.acquire(), pytest.raises(UserError, match=message):
            saver(folder).resume()
        assert (tmp_path / "records.jsonl").read_bytes() == before
        for step in steps:
            two.path(step).with_suffix(".whole").replace(two.path(step))
        assert two.load_latest()["step"] == 10


LOAD_WITH_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from gsdg.runs.checkpoint import Checkpoints
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, -1))
Checkpoints(Path(sys.argv[1])).load_latest()
"""


def test_too_little_memory_is_not_taken_for_damage(tmp_path):
    """In a new process: a fork of this one would find, and use, the memory that earlier tests have freed."""
    Checkpoints(tmp_path).save(5, {"x": torch.zeros(50_000_000)})
    command = [sys.executable, "-c", LOAD_WITH_LITTLE_MEMORY, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert "allocate memory" in done.stderr.splitlines()[-1] or "MemoryError" in done.stderr
    assert os.listdir(tmp_path) == ["step_00000005.pt"]


def test_the_checkpoint_that_was_just_saved_is_never_removed(tmp_path):
    """Even if there are checkpoints of later steps, so that a run that is stopped again and again makes progress."""
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20):
        checkpoints.path(step).write_bytes(b"damaged")
    for step in (5, 6, 7):
        checkpoints.save(step, {"x": torch.tensor(step)})
        assert checkpoints.path(step).exists()
    assert checkpoints.load_latest()["step"] == 7
    assert sorted(path.name for path in tmp_path.glob("step_*.pt")) == ["step_00000007.pt"]


def test_a_full_disk_leaves_the_old_checkpoint_and_no_temporary_file(disk):
    checkpoints = Checkpoints(disk)
    checkpoints.save(5, {"x": torch.zeros(100)})
    message = r"could not write .*step_00000010\.pt: No space left on device \([34]\."
    with pytest.raises(UserError, match=message) as error:
        checkpoints.save(10, {"x": torch.zeros(2_000_000)})
    assert f"The checkpoint before it, {checkpoints.path(5)}, is intact. Free some space" in str(error.value)
    assert os.listdir(disk) == ["step_00000005.pt"]
    assert checkpoints.load_latest()["step"] == 5
    checkpoints.path(5).unlink()
    message = r"step_00000010\.pt.*\n.*No checkpoint was saved before it.*starts at step 0"
    with pytest.raises(UserError, match=message):
        Checkpoints(disk).save(10, {"x": torch.zeros(2_000_000)})


class Broken:
    def __reduce__(self):
        raise RuntimeError("a bug")


def test_an_object_that_torch_cannot_save_is_a_bug_and_not_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="^a bug$"):
        save_atomically(tmp_path / "model.pt", {"x": Broken()})
    assert os.listdir(tmp_path) == []


def test_an_interrupted_save_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupted(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, {"x": 0})
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(10, {"x": 1})
    assert os.listdir(tmp_path) == ["step_00000005.pt"]


def test_the_slow_write_is_outside_the_fence_and_the_rename_is_inside(tmp_path, monkeypatch):
    inside, seen = [], []

    @contextmanager
    def fence():
        inside.append(True)
        yield
        inside.pop()

    def watch(owner, name):
        function = getattr(owner, name)
        noted = lambda *args, **kw: (seen.append((name, bool(inside))), function(*args, **kw))  # noqa: E731
        monkeypatch.setattr(owner, name, noted)

    Checkpoints(tmp_path / "made").save(4, {"x": 0})
    for owner, name in ((torch, "save"), (os, "replace"), (type(tmp_path), "unlink"), (type(tmp_path), "mkdir")):
        watch(owner, name)
    monkeypatch.setattr("gsdg.runs.checkpoint.KEEP", 1)
    Checkpoints(tmp_path / "made", fence).save(5, {"x": 0})
    assert seen[:3] == [("mkdir", True), ("save", False), ("replace", True)]
    assert ("unlink", True) in seen[3:]


def test_two_processes_never_write_the_same_temporary_file(tmp_path, monkeypatch):
    opened = []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: (opened.append(file.name), save(state, file)))
    for pid in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        Checkpoints(tmp_path).save(5, {"x": 0})
    assert len(set(opened)) == 2


def test_a_checkpoint_of_an_earlier_version_is_resumed_with_a_warning_about_what_is_missing(folder, caplog):
    class Part:
        state = "untouched"

        def load_state_dict(self, state):
            self.state = state

    old, new = Part(), Part()
    with folder.acquire():
        Checkpoints(folder.path / "checkpoints").save(5, {"random": random_states(), "old": "loaded"})
        assert saver(folder, old=old, new=new).resume() == (5, False)
        folder.set_status()
        assert folder.status["step"] == 5  # not the step that the killed run had reached
    assert (old.state, new.state) == ("loaded", "untouched")
    assert "step_00000005.pt holds no new, which starts from scratch" in caplog.text


def test_records_without_a_checkpoint_are_replaced_with_a_message(folder, caplog):
    caplog.set_level("INFO")
    with folder.acquire():
        assert saver(folder).resume() == (0, False)
        assert not caplog.text
        folder.append_record({"step": 0})
        assert saver(folder).resume() == (0, False)
        assert folder.records() == []
    assert "the run starts again at step 0 and replaces them" in caplog.text


def resumed(folder: RunFolder, network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, bool]:
    with folder.acquire():
        return saver(folder, algorithm=network, optimizer=optimizer).resume()


@pytest.fixture
def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A network and its optimizer after one step."""
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return network, optimizer


OTHER_NETWORKS = {
    r"algorithm: Error.* size mismatch for weight: .*\[2, 3\].*\[7, 3\]": torch.nn.Linear(3, 7),
    "algorithm: Error.* Missing key": torch.nn.Sequential(torch.nn.Linear(3, 2)),
    "algorithm: Error.* Unexpected key": torch.nn.Linear(3, 2, bias=False),
}


def test_a_checkpoint_that_does_not_fit_the_code_is_refused_and_the_records_stay(folder, trained):
    network, optimizer = trained
    with folder.acquire():
        for step in range(7):
            folder.append_record({"step": step})
        saving = saver(folder, algorithm=network, optimizer=optimizer)
        saving.after_step(5, True, None)
        saving.wait()
    assert resumed(folder, network, optimizer) == (5, False)
    with folder.acquire():
        for step in (5, 6):
            folder.append_record({"step": step})
    for message, other in OTHER_NETWORKS.items():
        with pytest.raises(UserError, match=rf"step_00000005\.pt does not fit .*: {message}") as error:
            resumed(folder, other, torch.optim.Adam(other.parameters()))
        assert "environment.jsonl names its commit" in str(error.value)
        assert "force=true" in str(error.value)
        assert len(folder.records()) == 7
    groups = [{"params": [parameter]} for parameter in network.parameters()]
    with pytest.raises(UserError, match=r"does not fit .*: optimizer: loaded state dict"):
        resumed(folder, network, torch.optim.Adam(groups))


def test_a_checkpoint_without_weights_is_refused(folder, trained):
    network, optimizer = trained
    state = {"random": random_states(), "algorithm": network.state_dict(), "optimizer": optimizer.state_dict()}
    for lacking in state:
        Checkpoints(folder.path / "checkpoints").save(5, {key: state[key] for key in state if key != lacking})
        with pytest.raises(UserError, match=f"it holds no {lacking}"):
            resumed(folder, network, optimizer)


def test_a_state_with_a_loss_that_is_not_finite_is_not_saved_for_a_signal(folder):
    """On an accelerator not every step is checked, so a checkpoint in between could hold NaN."""

    def refuse():
        raise ValueError("not finite")

    with folder.acquire(), Signals() as signals:
        stopping = saver(folder, signals)
        stopping.begin()
        os.kill(os.getpid(), signal.SIGUSR2)
        with pytest.raises(ValueError, match="not finite"):
            stopping.after_step(3, False, refuse)
    assert not list(folder.path.rglob("*.pt"))


def test_records_are_flushed_to_the_disk_before_a_checkpoint_is_saved(folder, monkeypatch):
    done = []
    monkeypatch.setattr(RunFolder, "flush_lines", lambda self: done.append("flushed"))
    monkeypatch.setattr(torch, "save", lambda *args: done.append("saved"))
    with folder.acquire():
        saving = saver(folder)
        saving.after_step(3, True, None)
        saving.wait()
    assert done == ["flushed", "saved"]


def test_a_stop_before_the_first_step_saves_nothing_and_a_later_one_saves_again(folder):
    """After the first step: a signal between the two checks of after_step makes the run save at once and stop after
    the next step. Before it: the flag is set but the exception was swallowed, as Python does in a finalizer."""
    signals = Signals()
    signals.stop = signal.SIGUSR2
    with pytest.raises(Stopped, match="nothing had to be saved"):
        saver(folder, signals).begin()
    with folder.acquire(), pytest.raises(Stopped, match="saved after 3 of 10"):
        saver(folder, signals).after_step(3, False, lambda: None)
    assert Checkpoints(folder.path / "checkpoints").load_latest()["step"] == 3


# ---- written by a thread ---------------------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch) -> threading.Event:
    """Checkpoints are not written before this event is set."""
    free, save = threading.Event(), Checkpoints.save

    def wait_and_save(self, step, state):
        assert free.wait(60)
        save(self, step, state)

    monkeypatch.setattr(Checkpoints, "save", wait_and_save)
    return free


def test_a_checkpoint_holds_the_state_of_its_step_although_the_training_goes_on(folder, trained, slow_disk):
    network, optimizer = trained
    weights, moments = network.weight.detach().clone(), optimizer.state[network.weight]["exp_avg"].clone()
    written = []
    with folder.acquire():
        saving = saver(folder, algorithm=network, optimizer=optimizer)
        saving.after_step(5, True, None, lambda: lambda: written.append(5))
        with torch.no_grad():
            network.weight.add_(1)
        optimizer.state[network.weight]["exp_avg"].add_(1)
        assert not list(folder.path.rglob("*.pt"))
        assert not written, "it is not on the disk yet"
        slow_disk.set()
        saving.wait()
        saving.wait()
    assert written == [5]
    state = Checkpoints(folder.path / "checkpoints").load_latest()
    assert torch.equal(state["algorithm"]["weight"], weights)
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], moments)
    assert state["algorithm"]._metadata == network.state_dict()._metadata


def test_an_error_of_the_thread_is_raised_at_the_next_checkpoint_and_at_the_end(folder, monkeypatch):
    def full(self, step, state):
        raise NotWritten(f"no space for {step}")

    written = []
    monkeypatch.setattr(Checkpoints, "save", full)
    with folder.acquire():
        saving = saver(folder)
        saving.after_step(3, True, None, lambda: lambda: written.append(3))
        with pytest.raises(NotWritten, match="no space for 3"):
            saving.after_step(6, True, None)
        saving.after_step(7, True, None)
        with pytest.raises(NotWritten, match="no space for 7"):
            saving.wait()
        saving.after_step(8, True, None)
        saving.close()  # another error is on its way
    assert not written


def test_a_run_that_stops_has_its_checkpoint_on_the_disk(folder, slow_disk):
    signals = Signals()
    signals.stop = signal.SIGUSR2
    threading.Timer(0.3, slow_disk.set).start()
    with folder.acquire(), pytest.raises(Stopped):
        saver(folder, signals).after_step(3, False, lambda: None)
    assert Checkpoints(folder.path / "checkpoints").load_latest()["step"] == 3
