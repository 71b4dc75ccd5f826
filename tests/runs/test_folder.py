"""A run on disk: who it is, who owns it, what it recorded."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from gsdg import runs
from gsdg.checkpoint import Checkpoints, save_atomically
from gsdg.owner import kernel_lock, process_start
from gsdg.runs import STALE_AFTER, Busy, LockLost, RunFolder, append_line, write_json


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
    assert "Busy: run run is being written by process" in second.stderr


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
    with pytest.raises(Busy, match="elsewhere"), other_host(tmp_path, time.time() - 60).hold():
        pass


def test_a_process_on_another_host_counts_as_dead_without_a_heartbeat(tmp_path):
    with other_host(tmp_path, time.time() - 600).hold():
        pass


WRITERS = {
    "record": lambda folder: folder.append_record({"step": 0}),
    "diagnosis": lambda folder: folder.append_diagnosis({"step": 0}),
    "status": lambda folder: folder.set_status(state="done"),
    "lines": lambda folder: folder.keep_lines_before(0),
    "json": lambda folder: folder.write("config.json", {}),
    "append": lambda folder: folder.append("environment.jsonl", {}),
    "checkpoint": lambda folder: Checkpoints(folder.path / "checkpoints", folder.writing).save(7, {"x": 1}),
    "removal": lambda folder: Checkpoints(folder.path / "checkpoints", folder.writing).remove(),
    "weights": lambda folder: save_atomically(folder.path / "model.pt", {}, fence=folder.writing),
}


def content(folder: RunFolder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.path.rglob("*")) if path.is_file()}


@pytest.fixture
def lost(tmp_path):
    """A folder that another process has taken over, with something of everything in it."""
    folder = RunFolder(tmp_path / "run")
    with folder.hold():
        folder.append_record({"step": 3})
        Checkpoints(folder.path / "checkpoints").save(5, {"x": 0})
        write_json(folder.path / "lock", {"token": "other", "pid": 12, "node": "n2", "job": "34_5", "restart": 2})
        yield folder


@pytest.mark.parametrize("writer", WRITERS)
def test_whoever_lost_the_lock_writes_nothing(lost, writer):
    before = content(lost)
    with pytest.raises(
        LockLost, match=r"run run was taken over by process 12 on n2 \(job 34_5, restart 2\)\.\nThis one"
    ):
        WRITERS[writer](lost)
    assert content(lost) == before


def test_whoever_lost_the_lock_leaves_it_and_the_folder_alone(lost):
    before = content(lost)
    lost._release()
    assert content(lost) == before


def test_a_folder_that_was_removed_is_not_made_again(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.hold():
        runs.shutil.rmtree(folder.path)
        with pytest.raises(LockLost, match="removed"):
            folder.append_record({"step": 0})
    assert not folder.path.exists()


@pytest.mark.parametrize(("job", "restart", "taken"), [("34_5", 2, True), ("34_5", 1, False), ("34_6", 2, False)])
def test_only_a_requeued_job_takes_over_from_its_live_earlier_start(tmp_path, monkeypatch, job, restart, taken):
    orphan, later = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "34")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    monkeypatch.setenv("SLURM_JOB_ID", "39")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    with orphan.hold():
        assert (orphan.status["job"], orphan.status["node"]) == ("34_5", "n1")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", job[-1])
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        if taken:
            with later.hold():
                later.append_record({"step": 1})
                with pytest.raises(LockLost):
                    orphan.append_record({"step": 2})
            with pytest.raises(LockLost):  # when the other has finished, too
                orphan.append_record({"step": 3})
            assert orphan.records() == [{"step": 1}]
        else:
            with pytest.raises(Busy, match=r"on n1 \(job 34_5, restart 1\)"), later.hold():
                pass


def test_two_processes_outside_of_slurm_are_not_one_requeued_job(tmp_path, monkeypatch):
    with RunFolder(tmp_path / "run").hold():
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with pytest.raises(Busy), RunFolder(tmp_path / "run").hold():
            pass


def test_nobody_takes_over_in_the_middle_of_a_write(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "34")
    orphan, later = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    order = []

    def take_over():
        with later.hold():
            order.append("taken over")

    with orphan.hold():
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        thread = threading.Thread(target=take_over)
        with orphan.writing():
            thread.start()
            time.sleep(0.3)
            order.append("written")
        thread.join(60)
    assert order == ["written", "taken over"]


def test_a_process_forked_during_a_write_does_not_keep_others_out(tmp_path):
    """A loader is forked whenever the heart may beat, and lives as long as the run."""
    folder, began = RunFolder(tmp_path / "run"), time.monotonic()
    with folder.hold(), folder.writing():
        pid = os.fork()
        if not pid:
            time.sleep(60)
            os._exit(0)
    try:
        with folder.hold():
            assert time.monotonic() - began < 50
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_the_lock_of_the_kernel_is_given_back_when_a_process_is_killed(tmp_path):
    code = f"from gsdg.owner import *\nwith kernel_lock(Path({str(tmp_path / 'x')!r})): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code])
    with kernel_lock(tmp_path / "x"):
        pass


def test_the_heart_beats_beside_a_busy_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "HEARTBEAT_EVERY", 0.002)
    folder = RunFolder(tmp_path / "run")
    with folder.hold():
        beats, step, end = set(), -1, time.monotonic() + 60
        while len(beats) < 5 and time.monotonic() < end:
            step += 1
            folder.progress(step)
            folder.append_record({"step": step})
            beats.add(folder.status["heartbeat"])
        assert len(beats) == 5
        assert [record["step"] for record in folder.records()] == list(range(step + 1))
        while folder.status["step"] != step:
            assert time.monotonic() < end + 60, "the heart has stopped"


def test_a_silent_owner_elsewhere_is_given_time_to_be_found_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "LOOK_EVERY", 0.05)
    heartbeat = time.time() - STALE_AFTER + 1
    with other_host(tmp_path, heartbeat).hold(patience=60):
        assert STALE_AFTER <= time.time() - heartbeat < STALE_AFTER + 50
        assert RunFolder(tmp_path / "run").status["host"] == socket.gethostname()


def test_an_owner_elsewhere_that_beats_again_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "LOOK_EVERY", 0.05)
    folder, refused = other_host(tmp_path, time.time() - 60), threading.Event()

    def beat() -> None:
        while not refused.wait(0.3):
            write_json(folder.path / "status.json", {"state": "running", "heartbeat": time.time()})

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    began = time.monotonic()
    with pytest.raises(Busy), folder.hold(patience=60):
        pass
    refused.set()
    heart.join()
    assert time.monotonic() - began < 50


def test_patience_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "LOOK_EVERY", 0.05)
    began = time.monotonic()
    with pytest.raises(Busy), other_host(tmp_path, time.time()).hold(patience=0.3):
        pass
    assert 0.3 <= time.monotonic() - began < 50


def test_a_live_owner_on_this_host_is_refused_without_waiting(tmp_path):
    with RunFolder(tmp_path / "run").hold():
        began = time.monotonic()
        with pytest.raises(Busy), RunFolder(tmp_path / "run").hold(patience=60):
            pass
        assert time.monotonic() - began < 50


@pytest.mark.parametrize("state", ["done", "failed", "stopped", None])
def test_only_a_running_run_is_live(tmp_path, state):
    folder = RunFolder(tmp_path / "run")
    assert not folder.is_live()
    with folder.hold():
        assert folder.is_live()
        folder.set_status(state=state)
        assert not folder.is_live()


def test_whether_a_run_is_live_is_told_by_its_process_here_and_by_its_heart_elsewhere(tmp_path):
    folder, here, now = RunFolder(tmp_path), socket.gethostname(), time.time()
    mine = {"state": "running", "host": here, "pid": os.getpid(), "process_start": process_start(os.getpid())}
    old = now - 2 * STALE_AFTER
    assert folder.is_live({**mine, "heartbeat": old})
    assert not folder.is_live({**mine, "heartbeat": now, "process_start": "1"})  # its number is another's now
    assert not folder.is_live({**mine, "heartbeat": now, "pid": 2**22 + 1})
    assert not folder.is_live({"state": "running", "host": here, "heartbeat": now})
    assert folder.is_live({**mine, "host": "elsewhere", "pid": 1, "heartbeat": now - STALE_AFTER / 2})
    assert not folder.is_live({**mine, "host": "elsewhere", "pid": 1, "heartbeat": old})
    assert not folder.is_live({"state": "running"})
    assert not folder.is_live({})


def test_what_killed_processes_were_writing_is_removed_when_the_lock_is_taken(tmp_path):
    folder = RunFolder(tmp_path / "run")
    (folder.path / "checkpoints").mkdir(parents=True)
    for name in (
        ".status.json.99.1",
        ".records.jsonl",
        ".model.pt.n1.99.part",
        "checkpoints/.step_00000007.pt.n1.99.part",
    ):
        (folder.path / name).write_text("half")
    (folder.path / "checkpoints" / "step_00000005.pt").write_text("whole")
    append_line(folder.path / "records.jsonl", {"step": 1})
    with folder.hold():
        left = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*")}
    assert left == {".guard", "lock", "status.json", "records.jsonl", "checkpoints", "checkpoints/step_00000005.pt"}


def test_a_run_that_is_done_stays_done_unless_it_is_made_afresh(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.hold(submission="a"):
        folder.set_status(state="done")
    before = folder.status
    with folder.hold(submission="b"):
        assert folder.status == before
    with folder.hold(afresh=True, submission="b"):
        assert (folder.status["state"], folder.status["submission"]) == ("running", "b")


def test_the_record_of_a_step_whose_evaluation_was_cut_short_is_dropped_and_its_diagnosis_kept(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.hold():
        for step in (0, 9, 10, 11):
            folder.append_record({"step": step})
            folder.append_diagnosis({"step": step})
        folder.keep_lines_before(11, recorded=False)
        assert [line["step"] for line in folder.records()] == [0, 9]
        assert [line["step"] for line in runs.read_lines(folder.path / "diagnostics.jsonl")] == [0, 9, 10]


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
