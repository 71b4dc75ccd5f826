"""A run on disk: who it is, who owns it, what it recorded."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time

import pytest

from gsdg.errors import UserError
from gsdg.runs import LockLost, RunFolder, read_json, run_id, write_json

CONFIG = {
    "dataset": {"name": "pacs", "root": "PACS"},
    "split": {"target": ["sketch"], "trial_seed": 0},
    "optimizer": {"lr": 5e-5},
    "trainer": {"steps": 10, "checkpoint_every": 5, "workers": 2, "log_every": 1, "keep_weights": True},
    "seed": 0,
    "device": "auto",
    "data_dir": "/data",
    "runs_dir": "runs",
    "force": False,
}


def changed(key: str, value: object) -> dict:
    config = copy.deepcopy(CONFIG)
    *parents, leaf = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    return config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_dir", "/elsewhere"),
        ("runs_dir", "/r"),
        ("device", "cuda"),
        ("force", True),
        ("trainer.workers", 0),
        ("trainer.checkpoint_every", 7),
        ("trainer.log_every", 9),
        ("trainer.keep_weights", False),
    ],
)
def test_where_and_how_a_run_is_made_does_not_change_its_id(key, value):
    assert run_id(changed(key, value)) == run_id(CONFIG)


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 1), ("trainer.steps", 11), ("split.target", ["photo"]), ("optimizer.lr", 1e-4), ("dataset.root", "X")],
)
def test_what_can_change_a_result_changes_the_id(key, value):
    assert run_id(changed(key, value)) != run_id(CONFIG)


def test_the_id_does_not_depend_on_the_order_of_keys():
    assert run_id(dict(reversed(CONFIG.items()))) == run_id(CONFIG)


def test_a_live_run_refuses_a_second_process(tmp_path):
    with RunFolder(tmp_path / "run").hold():
        second = subprocess.run(
            [
                sys.executable,
                "-c",
                f"from gsdg.runs import RunFolder\nRunFolder({str(tmp_path / 'run')!r}).hold().__enter__()",
            ],
            capture_output=True,
            text=True,
        )
    assert "UserError" in second.stderr
    assert "is being written by process" in second.stderr


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = f"""
import os, signal
from gsdg.runs import RunFolder
with RunFolder({str(tmp_path / "run")!r}).hold():
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code])
    assert (tmp_path / "run" / "lock").exists()
    with RunFolder(tmp_path / "run").hold():
        assert RunFolder(tmp_path / "run").status["state"] == "running"


def other_host(tmp_path, heartbeat: float) -> RunFolder:
    """A folder that a process on another host owns; two hosts cannot be had here, so their lock is written by hand."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    write_json(folder.path / "lock", {"token": "t", "host": "elsewhere", "pid": 1, "process_start": "1"})
    write_json(folder.path / "status.json", {"state": "running", "heartbeat": heartbeat})
    return folder


def test_a_process_on_another_host_counts_as_alive_while_its_heart_beats(tmp_path):
    with pytest.raises(UserError, match="elsewhere"), other_host(tmp_path, time.time() - 60).hold():
        pass


def test_a_process_on_another_host_counts_as_dead_without_a_heartbeat(tmp_path):
    with other_host(tmp_path, time.time() - 600).hold():
        pass


def test_whoever_lost_the_lock_cannot_write(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.hold():
        write_json(folder.path / "lock", {"token": "another"})
        with pytest.raises(LockLost):
            folder.append_record({"step": 0})
        with pytest.raises(LockLost):
            folder.set_status(state="done")
    assert read_json(folder.path / "lock") == {"token": "another"}  # and it leaves the other's lock alone


def test_a_truncated_last_line_is_dropped_on_resume(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.hold():
        for step in (0, 10, 20):
            folder.append_record({"step": step})
            folder.append_diagnosis({"step": step})
        for name in ("records.jsonl", "diagnostics.jsonl"):
            with (folder.path / name).open("a") as file:
                file.write('{"step": 30, "accu')
        folder.keep_lines_before(11)
        folder.append_record({"step": 20})
        folder.append_diagnosis({"step": 20})
    for name in ("records.jsonl", "diagnostics.jsonl"):
        lines = (folder.path / name).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 10, 20]


def test_afresh_removes_what_earlier_starts_left(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.hold():
        folder.append_record({"step": 0})
        folder.set_status(step=5, state="done")
    with folder.hold(afresh=True):
        assert folder.records() == []
        assert "step" not in folder.status
