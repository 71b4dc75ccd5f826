"""Runs on real file systems that are full or read-only: a message without a traceback, and nothing is lost."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import SMALL, Launcher, assert_same, fill, in_case, only_run, status

import gsdg.runs.folder
import gsdg.runs.run_log
from gsdg.experiment import run
from gsdg.plan import Plan, prepare
from gsdg.runs.disk import NotWritten
from gsdg.runs.kept_weights import KeptWeights

STEPS = 8
RUN = (*SMALL, "algorithm=erm", "trainer.evaluate=fast", "trainer.log_every=1", f"trainer.steps={STEPS}")
RUN = (*RUN, "trainer.eval_every=3", "trainer.checkpoint_every=4", "trainer.keep=last")


@pytest.fixture
def plan(compose, monkeypatch):
    monkeypatch.setattr("gsdg.experiment.environment", dict)  # it would call git three times
    return lambda runs_dir: prepare(compose(*RUN, f"runs_dir={runs_dir}"))


@pytest.fixture
def whole(plan, tmp_path) -> Path:
    """The folder of an uninterrupted run."""
    run(plan(tmp_path / "whole"))
    return only_run(tmp_path / "whole")


def before_call(monkeypatch, owner: object, name: str, number: int, then) -> None:
    """Call `then` once, before the call of a function with this number, counted from 0."""
    inner, calls = getattr(owner, name), []

    def watched(*arguments, **named):
        calls.append(name)
        if len(calls) == number + 1:
            then()
        return inner(*arguments, **named)

    monkeypatch.setattr(owner, name, watched)


def refused(plan: Plan) -> str:
    with pytest.raises(NotWritten) as refusal:
        run(plan)
    return str(refusal.value)


@pytest.mark.parametrize("steps", [(0, 3, 6), pytest.param((1, 2, 4, 5, 7), marks=pytest.mark.slow)])
def test_a_disk_that_fills_at_any_step_is_a_message_and_the_resumed_run_ends_like_an_uninterrupted_one(
    monkeypatch, plan, whole, disk, steps, capsys
):
    for step in steps:
        with in_case("step", step), monkeypatch.context() as patch:
            before_call(patch, torch.optim.Adam, "step", step, lambda: fill(disk))
            message = refused(plan(disk / f"{step}"))
            assert re.search(r"No space left on device \(.*MB free there\)(.|\n)*the same command again", message)
            (disk / "filler").unlink()
            run(plan(disk / f"{step}"))
            assert_same(whole, only_run(disk / f"{step}"))
            assert capsys.readouterr().err.count("lines are missing from") <= 1
            shutil.rmtree(disk / f"{step}")


@pytest.mark.parametrize(
    ("owner", "function", "number", "file", "left"),
    [
        (torch, "save", 1, "checkpoints/step_00000008.pt", ["step_00000004.pt"]),
        (KeptWeights, "finish", 0, "model.pt", ["step_00000004.pt", "step_00000008.pt"]),
    ],
    ids=["checkpoint", "final weights"],
)
def test_a_disk_without_space_for_a_file_of_weights_names_the_last_checkpoint(
    monkeypatch, plan, whole, disk, owner, function, number, file, left
):
    before_call(monkeypatch, owner, function, number, lambda: fill(disk))
    message = refused(plan(disk))
    folder = only_run(disk)
    assert f"could not write {folder}/{file}: No space left on device (0." in message
    assert f"The checkpoint before it, {folder}/checkpoints/{left[-1]}, is intact." in message
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == left
    (disk / "filler").unlink()
    run(plan(disk))
    assert_same(whole, folder)


def test_a_disk_without_space_for_the_selected_weights_says_so_and_the_run_can_go_on(
    monkeypatch, compose, plan, tmp_path, disk
):
    selected = (*RUN, "trainer.keep=selected")
    run(prepare(compose(*selected, f"runs_dir={tmp_path / 'selected'}")))
    config = compose(*selected, f"runs_dir={disk}")
    before_call(monkeypatch, torch, "save", 0, lambda: fill(disk))
    message = refused(prepare(config))
    assert f"could not write {only_run(disk)}/weights/step_0.pt: No space left on device (0." in message
    assert "No checkpoint was saved before it." in message
    (disk / "filler").unlink()
    run(prepare(config))
    assert_same(only_run(tmp_path / "selected"), only_run(disk))


def test_a_status_that_cannot_be_written_is_a_warning(monkeypatch, plan, disk, caplog):
    def fill_twice() -> None:
        fill(disk)
        before_call(monkeypatch, gsdg.runs.folder.RunFolder, "set_status", 0, lambda: fill(disk))

    before_call(monkeypatch, torch, "save", 1, fill_twice)
    refused(plan(disk))
    assert "status.json could not be written, it still says running: could not write" in caplog.text
    assert status(only_run(disk))["state"] == "running"


def test_the_reason_is_in_the_status_if_there_is_space_for_it(monkeypatch, plan, disk):
    before_call(monkeypatch, torch, "save", 1, lambda: fill(disk))
    before_call(monkeypatch, gsdg.runs.run_log, "_set_final_status", 0, (disk / "filler").unlink)
    refused(plan(disk))
    left = status(only_run(disk))
    assert left["state"] == "failed"
    assert left["reason"].startswith("NotWritten: could not write ")
    assert left["reason"].endswith("free there).")


def test_a_run_in_a_read_only_folder_is_a_message(launch_here, disk):
    """If the folder does not exist, Hydra fails to create it."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, capture_output=True)
    for runs_dir in (disk, disk / "runs"):
        answer = launch_here(*RUN, f"runs_dir={runs_dir}")
        assert answer.returncode == 1
        for text in ("Read-only file system", str(disk), "runs_dir=FOLDER"):
            assert text in answer.stderr
        assert "Traceback" not in answer.stderr


@pytest.mark.slow
def test_a_launch_on_a_disk_that_fills_ends_with_the_message_alone(disk, launch_here):
    overrides = (*RUN, "trainer.steps=200", "trainer.eval_every=1000", "trainer.checkpoint_every=20")
    process = Launcher(disk).start(*overrides)
    while not list(disk.glob("*/checkpoints/step_*.pt")) and process.poll() is None:
        time.sleep(0.01)
    fill(disk)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "No space left on device" in errors
    assert "The checkpoint before it" in errors
    assert "Traceback" not in errors
    assert errors.count("lines are missing from") == 1
    (disk / "filler").unlink()
    again = launch_here(*overrides, f"runs_dir={disk}")
    assert again.returncode == 0, again.stderr
    assert "resuming at step" in again.stdout
