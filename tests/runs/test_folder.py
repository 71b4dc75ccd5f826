"""A run on disk: its lock, its status and its records."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import REPOSITORY, fill, in_case

from gsdg.runs import folder as runs
from gsdg.runs import lock as run_lock
from gsdg.runs.checkpoint import Checkpoints, save_atomically
from gsdg.runs.disk import NotWritten
from gsdg.runs.folder import STALE_AFTER, Busy, LockLost, RunFolder
from gsdg.runs.process_identity import pid_namespace, this_process
from gsdg.utils.file_locks import file_lock
from gsdg.utils.json_files import append_line, read_json, write_json

IMPORTS = "import os, sys, time; from pathlib import Path; from gsdg.runs.folder import Busy, RunFolder\n"
HOLDING = f"""{IMPORTS}
with RunFolder(Path(sys.argv[1])).acquire():
    print("holds", flush=True)
    time.sleep(600)
"""
TAKING = f"""{IMPORTS}
folder = RunFolder(Path(sys.argv[1]))
print(folder.is_live())
try:
    with folder.acquire():
        print("taken over")
except Busy as busy:
    print(busy)
"""
PYTHON = [sys.executable]


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def held(folder):
    """The folder of a run of this process."""
    with folder.acquire():
        yield folder


def acquire(folder: RunFolder, **options) -> dict:
    """Take the lock and give it back; returns the status meanwhile."""
    with folder.acquire(**options):
        return folder.status


def holding(folder: Path, python: Sequence[str] = PYTHON) -> subprocess.Popen:
    """A process that holds the lock of the folder."""
    command = [*python, "-c", HOLDING, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout.readline() == "holds\n"
    return process


def printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY).stdout


def test_a_live_run_refuses_a_second_process_and_a_killed_one_is_taken_over(folder):
    process = holding(folder.path)
    began = time.monotonic()
    with pytest.raises(Busy, match="run run is being written by process"):
        acquire(folder)
    process.kill()
    process.wait()
    assert (folder.path / "lock").exists()
    with folder.acquire():
        assert RunFolder(folder.path).status["state"] == "running"
        with pytest.raises(Busy):
            acquire(RunFolder(folder.path), patience=60)  # busy at once
    assert time.monotonic() - began < 50


def write_lock(folder: RunFolder, heartbeat: float, **owner: object) -> RunFolder:
    """The lock and the status of another process. There is one host here, so they are written by hand."""
    folder.path.mkdir(exist_ok=True)
    owner = owner or {"host": "elsewhere", "pid": 1, "process_start": "1"}
    write_json(folder.path / "lock", {"token": "t", **owner})
    write_json(folder.path / "status.json", {"state": "running", "heartbeat": heartbeat, **owner})
    return folder


def test_a_process_on_another_host_counts_as_alive_while_it_sends_heartbeats(folder):
    with pytest.raises(Busy, match="elsewhere"):
        acquire(write_lock(folder, time.time() - 60))
    acquire(write_lock(folder, time.time() - 600))


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
    files = (path for path in sorted(folder.path.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder.path)): path.read_bytes() for path in files}


def test_a_process_that_lost_the_lock_writes_nothing_and_leaves_the_lock(held):
    held.append_record({"step": 3})
    Checkpoints(held.path / "checkpoints").save(5, {"x": 0})
    write_json(held.path / "lock", {"token": "other", "pid": 12, "node": "n2", "job": "34_5", "restart": 2})
    before = content(held)
    message = r"run run was taken over by process 12 on n2 \(job 34_5, restart 2\)\.\nThis process"
    for name, write in WRITERS.items():
        with in_case(name), pytest.raises(LockLost, match=message):
            write(held)
        assert content(held) == before, name
    held.lock.release()
    assert content(held) == before


def test_a_folder_that_was_removed_is_not_created_again(folder):
    with folder.acquire():
        runs.shutil.rmtree(folder.path)
        with pytest.raises(LockLost, match="removed"):
            folder.append_record({"step": 0})
    assert not folder.path.exists()


def test_only_a_requeued_job_takes_over_from_its_live_earlier_start(folder, tmp_path, monkeypatch):
    later = RunFolder(tmp_path / "run")
    with folder.acquire():  # outside of SLURM
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with pytest.raises(Busy):
            acquire(later)
    for name, value in {"ARRAY_JOB_ID": "34", "ARRAY_TASK_ID": "5", "JOB_ID": "39"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    with folder.acquire():
        assert (folder.status["job"], folder.status["node"]) == ("34_5", "n1")
        for task, restart in (("5", "1"), ("6", "2")):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
            monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
            with pytest.raises(Busy, match=r"on n1 \(job 34_5, restart 1\)"):
                acquire(later)
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
        with later.acquire():
            later.append_record({"step": 1})
            with pytest.raises(LockLost):
                folder.append_record({"step": 2})
        with pytest.raises(LockLost):  # when the other has finished, too
            folder.append_record({"step": 3})
        assert folder.records() == [{"step": 1}]


def test_nobody_takes_over_in_the_middle_of_a_write(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "34")
    later, order = RunFolder(tmp_path / "run"), []

    def take_over():
        with later.acquire():
            order.append("taken over")

    with folder.acquire():
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        thread = threading.Thread(target=take_over)
        with folder.writing():
            thread.start()
            time.sleep(0.3)
            order.append("written")
        thread.join(60)
    assert order == ["written", "taken over"]


def test_a_process_forked_during_a_write_does_not_keep_others_out(folder):
    """A data loader may be forked while a heartbeat is written, and lives as long as the run."""
    began = time.monotonic()
    with folder.acquire(), folder.writing():
        pid = os.fork()
        if not pid:
            time.sleep(60)
            os._exit(0)
    try:
        acquire(folder)
        assert time.monotonic() - began < 50
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_file_lock_ends_with_a_process_that_is_killed(tmp_path):
    pid = os.fork()
    if not pid:
        try:
            with file_lock(tmp_path / "x"):
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    with file_lock(tmp_path / "x"):
        pass


def test_heartbeats_are_sent_while_the_main_thread_writes(folder, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_EVERY", 0.002)
    with folder.acquire():
        heartbeats, step, end = set(), -1, time.monotonic() + 60
        while len(heartbeats) < 5 and time.monotonic() < end:
            step += 1
            folder.progress(step)
            folder.append_record({"step": step})
            heartbeats.add(folder.status["heartbeat"])
        assert len(heartbeats) == 5
        assert [record["step"] for record in folder.records()] == list(range(step + 1))
        while folder.status["step"] != step:
            assert time.monotonic() < end + 60, "no heartbeat any more"


@pytest.mark.parametrize("owner", [{}, {"pid_namespace": "1 of boot 0-0"}], ids=["another host", "another container"])
def test_the_lock_of_a_silent_owner_elsewhere_is_taken_over_once_its_heartbeat_is_stale(folder, monkeypatch, owner):
    monkeypatch.setattr(run_lock, "RETRY_EVERY", 0.05)
    heartbeat = time.time() - STALE_AFTER + 1
    status = acquire(write_lock(folder, heartbeat, **(owner and this_process() | owner)), patience=60)
    assert STALE_AFTER <= time.time() - heartbeat < STALE_AFTER + 50
    assert status["host"] == socket.gethostname()


def test_an_owner_on_another_host_that_sends_a_heartbeat_is_busy_at_once_and_patience_ends(folder, monkeypatch):
    monkeypatch.setattr(run_lock, "RETRY_EVERY", 0.05)
    refused = threading.Event()
    write_lock(folder, time.time() - 60)

    def send_heartbeats() -> None:
        while not refused.wait(0.3):
            write_json(folder.path / "status.json", {"state": "running", "heartbeat": time.time()})

    heartbeats = threading.Thread(target=send_heartbeats, daemon=True)
    heartbeats.start()
    began = time.monotonic()
    with pytest.raises(Busy):
        acquire(folder, patience=60)
    refused.set()
    heartbeats.join()
    assert time.monotonic() - began < 50
    began = time.monotonic()
    with pytest.raises(Busy):
        acquire(write_lock(folder, time.time()), patience=0.3)
    assert 0.3 <= time.monotonic() - began < 50


def test_whether_a_run_is_live_depends_on_its_state_its_process_here_and_its_heartbeat_elsewhere(folder):
    assert not folder.is_live()
    with folder.acquire():
        assert folder.is_live()
        for state in ("done", "failed", "stopped", None):
            folder.set_status(state=state)
            assert not folder.is_live(), state
    now = time.time()
    me = {"state": "running", **{key: this_process()[key] for key in ("host", "pid", "process_start")}}
    old = now - 2 * STALE_AFTER
    assert folder.is_live({**me, "heartbeat": old})
    assert not folder.is_live({**me, "heartbeat": now, "process_start": "1"})  # its number is another's now
    assert not folder.is_live({**me, "heartbeat": now, "pid": 2**22 + 1})
    assert not folder.is_live({"state": "running", "host": me["host"], "heartbeat": now})
    assert folder.is_live({**me, "host": "elsewhere", "pid": 1, "heartbeat": now - STALE_AFTER / 2})
    assert not folder.is_live({**me, "host": "elsewhere", "pid": 1, "heartbeat": old})
    assert not folder.is_live({"state": "running"})
    assert not folder.is_live({})


def test_temporary_files_of_killed_processes_are_removed_when_the_lock_is_acquired(folder):
    (folder.path / "checkpoints").mkdir(parents=True)
    temporary = (".status.json.99.1", ".records.jsonl", ".model.pt.n1.99.part")
    for name in (*temporary, "checkpoints/.step_00000007.pt.n1.99.part"):
        (folder.path / name).write_text("half")
    (folder.path / "checkpoints" / "step_00000005.pt").write_text("whole")
    append_line(folder.path / "records.jsonl", {"step": 1})
    with folder.acquire():
        left = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*")}
    assert left == {".guard", "lock", "status.json", "records.jsonl", "checkpoints", "checkpoints/step_00000005.pt"}


# ---- records --------------------------------------------------------------------------------------------------------

LINES = ("records.jsonl", "diagnostics.jsonl")


def append(folder: RunFolder, *steps: int) -> None:
    for step in steps:
        folder.append_record({"step": step})
        folder.append_diagnosis({"step": step})


def test_the_record_of_a_step_whose_evaluation_was_interrupted_is_removed_and_its_diagnosis_kept(held):
    append(held, 0, 9, 10, 11)
    held.keep_lines_before(11, recorded=False)
    assert [line["step"] for line in held.records()] == [0, 9]
    assert [line["step"] for line in runs.read_lines(held.path / "diagnostics.jsonl")] == [0, 9, 10]


def test_a_truncated_last_line_is_removed_on_resume_even_if_it_is_the_only_one(held, caplog):
    for steps in ((), (0, 10, 20)):
        append(held, *steps)
        for name in LINES:
            with (held.path / name).open("a") as file:
                file.write('{"step": 30, "accu')
        held.keep_lines_before(11)
        append(held, 20)
        for name in LINES:
            lines = (held.path / name).read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == [*steps[:2], 20]
        held.keep_lines_before(0)
    assert not caplog.text  # it is recorded again


def test_lines_without_a_record_are_removed_on_resume_with_a_warning_if_a_record_may_be_missing(held, caplog):
    broken = [b"[1]", b"7", b'{"step": "\xff"}', b'{"n": 1}', b'{"step": null}']
    lines = [b'{"step": 0, "accuracy": 0.10}', *broken, b'{"step": 10}']
    (held.path / "records.jsonl").write_bytes(b"\n".join([*lines, b'{"step": 2']))
    held.keep_lines_before(11)
    held.append_record({"step": 20})
    assert (held.path / "records.jsonl").read_bytes() == b"\n".join([lines[0], lines[-1], b'{"step": 20}', b""])
    assert "records.jsonl: 5 of 8 lines could not be read and are removed" in caplog.text


def flushed_by(monkeypatch, action) -> list[str]:
    """The names of the files and folders that `action` flushes to the disk."""
    names, fsync = [], os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (names.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
        action()
    return [Path(name).name for name in names]


def test_the_files_that_a_resume_needs_are_flushed_to_the_disk_with_their_names(held, monkeypatch):
    for step in range(3):
        held.append_record({"step": step})
    assert flushed_by(monkeypatch, held.flush_lines) == ["records.jsonl", "run"]
    (temporary, parent) = flushed_by(monkeypatch, lambda: held.keep_lines_before(1))
    assert (temporary.startswith(".records.jsonl."), parent) == (True, "run")
    assert flushed_by(monkeypatch, lambda: held.write("config.json", {}))[1:] == ["run"]
    assert flushed_by(monkeypatch, lambda: held.set_status(state="done"))[1:] == ["run"]
    assert flushed_by(monkeypatch, held.set_status) == []
    checkpoints = Checkpoints(held.path / "checkpoints")
    assert flushed_by(monkeypatch, lambda: checkpoints.save(3, {}))[1:] == ["checkpoints"]
    before = os.stat(held.path / "records.jsonl").st_ino
    held.keep_lines_before(1)
    assert os.stat(held.path / "records.jsonl").st_ino == before, "it was written again, without a line to remove"


# ---- force=true -----------------------------------------------------------------------------------------------------


def earlier_run(path: Path) -> RunFolder:
    """A run that is done, with the files of such a run, and with a checkpoint as a stopped run would have."""
    folder = RunFolder(path)
    with folder.acquire(submission="a"):
        for step in range(5):
            folder.append_record({"step": step})
        for name in ("config.json", "identity.json"):
            folder.write(name, {"of": "the earlier run"})
        Checkpoints(folder.path / "checkpoints").save(5, {"x": 0})
        folder.set_status(state="done", step=5)
    return folder


def test_a_run_that_is_done_stays_done_unless_it_starts_from_scratch(tmp_path):
    folder = earlier_run(tmp_path / "run")
    before = folder.status
    assert acquire(folder, submission="b") == before
    with folder.acquire(from_scratch=True, submission="b"):
        assert (folder.status["state"], folder.status["submission"]) == ("running", "b")
        assert folder.records() == []
        assert "step" not in folder.status


KILLED_WHILE_REMOVING = f"""{IMPORTS}
calls, call = 0, int(sys.argv[2])
def watch(event, arguments):  # every removal of a file or folder, whoever asks for it
    global calls
    if event in ("os.remove", "os.rmdir") and "/." not in str(arguments[0]):
        if calls == call:
            os.kill(os.getpid(), int(sys.argv[3]))
        calls += 1
sys.addaudithook(watch)
with RunFolder(Path(sys.argv[1])).acquire(from_scratch=True):
    print("everything was removed", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_when_the_removal_of_an_earlier_run_is_interrupted_the_run_is_not_done_and_the_next_start_continues_it(
    tmp_path, number
):
    """A real process is killed before its first, second, ... removal of a file or folder."""
    kept, left = {"lock", ".guard", "status.json"}, []
    for call in range(20):
        folder = earlier_run(tmp_path / f"run{call}")
        before = content(folder)
        if "everything was removed" in printed(
            *PYTHON, "-c", KILLED_WHILE_REMOVING, str(folder.path), str(call), str(number)
        ):
            break
        assert folder.status["state"] == "running"
        assert not folder.is_live()
        left.append(len(content(folder)))
        with folder.acquire():  # without force
            assert set(content(folder)) == kept
            assert folder.status["state"] == "running"
            assert "removing" not in folder.status
            folder.append_record({"step": 0})
        with folder.acquire():
            assert folder.records() == [{"step": 0}], "removed again"
    assert len(left) == len(set(before) - kept) + 1  # and a folder


# ---- the disk -------------------------------------------------------------------------------------------------------

FILLERS = {name: writer for name, writer in WRITERS.items() if name not in ("removal", "lines", "status")}


def test_a_full_disk_is_named_with_what_to_do(disk):
    folder = RunFolder(disk / "run")
    with folder.acquire():
        for name in (*LINES, "environment.jsonl"):
            (folder.path / name).write_text("{}" + " " * 4093 + "\n")  # the next line needs a page of its own
        (folder.path / "checkpoints").mkdir()
        message = r"could not write .*: No space left on device \(0\.0 MB free there\)(.|\n)*the same command again"
        for name, write in FILLERS.items():
            fill(disk)
            with in_case(name), pytest.raises(NotWritten, match=message):
                write(folder)
            assert not [path.name for path in folder.path.rglob(".*") if path.name != ".guard"], name
            (disk / "filler").unlink()
        for write in FILLERS.values():
            write(folder)


def test_records_that_cannot_be_cut_back_on_a_full_disk_stay_as_they_are(disk):
    folder = RunFolder(disk / "run")
    with folder.acquire():
        for step in range(100):
            folder.append_record({"step": step, "text": "x" * 100})
        before = content(folder)["records.jsonl"]
        fill(disk)
        with pytest.raises(NotWritten, match=r"could not write .*records\.jsonl: No space"):
            folder.keep_lines_before(90)
        assert content(folder)["records.jsonl"] == before


def remounted(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True, capture_output=True)


def test_a_folder_that_cannot_be_written_is_named_with_what_to_do(disk, tmp_path):
    earlier_run(disk / "earlier")
    message = r"could not write .*{}.*: Read-only file system\.\n.*runs_dir=FOLDER"
    for name, state in {"earlier": "done", "new": "running"}.items():
        folder = RunFolder(disk / name)
        remounted(disk, "ro")
        with pytest.raises(NotWritten, match=message.format(name)):
            acquire(folder)
        remounted(disk, "rw")
        assert acquire(folder)["state"] == state
    with folder.acquire():
        remounted(disk, "ro")  # during a run
        for write in (WRITERS["record"], WRITERS["status"]):
            with pytest.raises(NotWritten, match="Read-only file system"):
                write(folder)
        remounted(disk, "rw")
    (tmp_path / "runs").write_text("")
    with pytest.raises(NotWritten, match="could not write .*: Not a directory"):
        acquire(RunFolder(tmp_path / "runs" / "a"))


@pytest.mark.parametrize("name", ["lock", "status.json"])
def test_a_run_whose_lock_or_status_the_disk_cannot_read_is_not_taken_over(tmp_path, name):
    """/proc/self/mem: Linux opens it, and reading its beginning is a real EIO."""
    folder = earlier_run(tmp_path / "run")
    before = content(folder)
    acquire(RunFolder(tmp_path / "other"))
    (folder.path / name).unlink(missing_ok=True)
    (folder.path / name).symlink_to("/proc/self/mem")
    with pytest.raises(NotWritten, match=rf"{name}: Input/output error\.\n.*the same command again"):
        acquire(folder)
    (folder.path / name).unlink()
    after = content(folder)
    assert after == {key: before[key] for key in after}
    assert set(before) - set(after) <= {name}


# ---- containers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def container() -> list[str]:
    """The command that runs a given command in a PID namespace of its own, with this hostname."""
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("cannot make a PID namespace here (needs root and util-linux's unshare)")
    return command


@pytest.mark.parametrize(
    ("holder", "taker"), [("container", "here"), ("here", "container"), ("container", "container")]
)
def test_a_live_run_in_another_container_of_one_hostname_is_not_taken_over(folder, container, holder, taker):
    """Its pid does not exist, or is the pid of another process, in the container that looks it up."""
    python = {"here": PYTHON, "container": [*container, *PYTHON]}
    process = holding(folder.path, python[holder])
    take = [*python[taker], "-c", TAKING, str(folder.path)]
    try:
        answer = printed(*take)
        assert answer.startswith("True\nrun run is being written by process "), answer
        assert f"on {socket.gethostname()}, in another container" in answer
    finally:
        process.kill()
        process.wait()
    assert read_json(folder.path / "lock")["pid_namespace"]
    write_json(folder.path / "status.json", {**folder.status, "heartbeat": time.time() - STALE_AFTER - 1})
    assert printed(*take) == "False\ntaken over\n"


def test_in_one_container_a_dead_process_is_taken_over_at_once(folder, container):
    script = f'timeout -s KILL 3 {sys.executable} -c "$1" $0; {sys.executable} -c "$2" $0'
    answer = printed(*container, "bash", "-c", script, str(folder.path), HOLDING, TAKING)
    assert answer == "holds\nFalse\ntaken over\n"


def test_for_a_lock_of_an_earlier_version_the_hostname_decides(folder):
    folder.path.mkdir()
    me = {key: value for key, value in this_process().items() if key != "pid_namespace"}
    for noted in ({"pid_namespace": None}, {}):
        write_json(folder.path / "lock", {"token": "t", **me, **noted})
        with pytest.raises(Busy):
            acquire(folder)
        write_json(folder.path / "lock", {"token": "t", **me, **noted, "process_start": "1"})
        assert acquire(folder)["pid_namespace"] == pid_namespace()


def test_two_machines_of_one_hostname_are_distinguished_by_their_boot_ids(folder):
    """Their first namespaces have the same number. The lock of a second machine is written by hand."""
    number, boot = pid_namespace().split(" of boot ")
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    elsewhere = {**this_process(), "pid_namespace": f"{number} of boot 0-0", "process_start": "1"}
    write_lock(folder, time.time() - 60, **elsewhere)
    assert folder.is_live()
    with pytest.raises(Busy):
        acquire(folder)
    write_lock(folder, time.time() - 2 * STALE_AFTER, **elsewhere)
    assert not folder.is_live()
    acquire(folder)
