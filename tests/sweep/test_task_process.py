"""A pack executes its runs as child processes; no SLURM: the test calls it in place of submitit."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import REPOSITORY, SMALL, status

from gsdg.plan import prepare
from gsdg.runs.folder import RunFolder
from gsdg.sweep import run_one, task_process
from gsdg.sweep.bootstrap import DAMAGED
from gsdg.sweep.folder import FrozenRun, SweepFolder
from gsdg.sweep.run_states import run_states
from gsdg.sweep.task_process import FAILED, Pack, PackFailed, TakenOver

pytestmark = pytest.mark.slow
SHORT = "trainer.steps=2"
LONG = "trainer.steps=100000 trainer.eval_every=100000 trainer.log_every=1"
DIVERGES = "trainer.steps=9 optimizer=sgd optimizer.lr=1e30"


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch, caplog):
    caplog.set_level("INFO")
    for name, seconds in {"CANCELLED_EVERY": 0.5, "BUSY_EVERY": 0.2, "AFTER_SIGKILL": 0.1}.items():
        monkeypatch.setattr(task_process, name, seconds)


@pytest.fixture
def pack(compose, tmp_path) -> Callable[..., Pack]:
    """A pack of runs, each given by its overrides (as one string)."""

    def pack(*runs: str, side_by_side: int = 1, submission: str = "gsdg-s-0", **more: object) -> Pack:
        plans = [prepare(compose(*SMALL, *text.split())) for text in runs]
        frozen = [FrozenRun(plan.run_id, text.split(), plan.config) for plan, text in zip(plans, runs, strict=True)]
        sweep = SweepFolder(tmp_path / "runs" / ".sweeps" / "s")
        sweep.write({}, frozen)
        sweep.append("submitted", cluster="local", array="gsdg-s-0", packs=[[run.run_id for run in frozen]])
        options = {"grace": 60.0, **more}
        return Pack(sweep.path, "gsdg-s-0", submission, frozen, side_by_side, **options)

    return pack


def folder(pack: Pack, number: int = 0) -> Path:
    return Path(pack.runs[number].config["runs_dir"]) / pack.runs[number].run_id


def cancel(pack: Pack, *numbers: int) -> None:
    SweepFolder(pack.sweep).append("cancelled", runs=[pack.runs[number].run_id for number in numbers])


def in_background(pack: Pack) -> tuple[threading.Thread, list]:
    """Execute the pack in a thread; the exception that it raises is appended to the list."""
    raised: list = []

    def work() -> None:
        try:
            pack()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, raised


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def wait_for_step(pack: Pack, number: int, step: int = 5) -> None:
    log = folder(pack, number) / "log.txt"
    wait_until(lambda: log.exists() and f"step {step}/" in log.read_text())


# ---- the processes ------------------------------------------------------------------------------------------------


def test_failures_neither_stop_nor_hide_the_others_and_done_runs_are_repeated_only_once_a_submission(pack):
    work = pack("seed=1 " + SHORT, DIVERGES, SHORT)
    folder(work, 0).write_text("")  # a file in the place of the folder, which even root cannot write
    with pytest.raises(PackFailed, match=f"2 of 3 runs failed: {work.runs[0].run_id}, {work.runs[1].run_id}"):
        work()
    first, second, third = run_states(work.runs, folder(work).parent, None)
    assert (first.state, second.state, third.state) == ("failed", "failed", "done")
    assert "Not a directory" in first.reason
    assert "NonFinite" in second.reason
    assert status(folder(work, 2))["submission"] == "gsdg-s-0"
    started = [status(folder(work, 2))["started"]]
    again = pack(SHORT, from_scratch=True, submission="gsdg-s-1")
    for task in (pack(SHORT), again, again):  # the last: the task was queued again
        task()
        started.append(status(folder(task))["started"])
    assert started[0] == started[1] < started[2] == started[3]


def test_asked_by_submitit_every_child_saves_and_the_next_start_goes_on(pack):
    work = pack("seed=0 " + LONG, "seed=1 " + LONG, side_by_side=2)
    thread, _ = in_background(work)
    for number in (0, 1):
        wait_for_step(work, number)
    work.side_by_side = 0  # submitit would end the pack after this; here it must not start its runs again
    again = pickle.loads(pickle.dumps(work.checkpoint())).function
    assert [status(folder(work, number))["state"] for number in (0, 1)] == ["stopped", "stopped"]
    saved = [int(next((folder(work, n) / "checkpoints").glob("*.pt")).stem.removeprefix("step_")) for n in (0, 1)]
    cancel(work, 0, 1)
    thread.join(60)
    SweepFolder(work.sweep).append("submitted", cluster="local", array=work.array, packs=[])
    again.side_by_side = 2
    assert again.runs == work.runs
    assert not again._children
    thread, raised = in_background(again)
    for number, step in enumerate(saved):
        wait_for_step(again, number, step + 3)
        assert f"resuming at step {step} " in (folder(work, number) / "log.txt").read_text()
    cancel(work, 0, 1)
    thread.join(60)
    assert not thread.is_alive()
    assert not raised


def test_a_killed_child_is_failed_and_a_cancelled_one_leaves_its_place_to_the_next(pack, caplog):
    work = pack(LONG, "seed=1 " + LONG, "seed=2 " + SHORT, "seed=3 " + SHORT, side_by_side=2)
    cancel(work, 3)
    thread, raised = in_background(work)
    for number in (0, 1):
        wait_for_step(work, number)
    os.kill(status(folder(work, 0))["pid"], signal.SIGKILL)
    cancel(work, 1)
    thread.join(300)
    (error,) = raised
    assert isinstance(error, PackFailed)
    assert [status(folder(work, number))["state"] for number in (0, 1, 2)] == ["failed", "stopped", "done"]
    assert "SIGKILL" in status(folder(work, 0))["reason"]
    assert f"run {work.runs[3].run_id} starts" not in caplog.text


def test_a_run_taken_over_by_another_copy_of_the_task_ends_this_one(pack):
    work = pack(LONG, "seed=1 " + SHORT)
    thread, raised = in_background(work)
    wait_for_step(work, 0)
    (folder(work) / "lock").write_text('{"token": "another", "host": "n2", "pid": 1, "process_start": null}')
    thread.join(300)
    assert isinstance(raised[0], TakenOver)
    assert not folder(work, 1).exists(), "the orphan must not begin another run"


class Writer:
    """Another process that holds the lock of a run's folder until `end()`."""

    def __init__(self, folder: Path) -> None:
        code = (
            f"from gsdg.runs.folder import RunFolder\nfolder = RunFolder({str(folder)!r})\n"
            "with folder.acquire():\n    if input(): folder.set_status(state='done')"
        )
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True, cwd=REPOSITORY)
        wait_until(RunFolder(folder).is_live)

    def end(self, *, done: bool = False) -> None:
        """End the process. done: it has finished the run."""
        self.process.communicate("done\n" if done else "\n")


def test_runs_that_other_live_processes_write_are_waited_for_while_the_others_are_done(pack, caplog):
    """As after `cancel` and `retry`: SLURM kills the old process only after KillWait seconds."""
    work = pack(*(f"seed={number} {SHORT}" for number in range(4)))
    released, finished, _ = writers = [Writer(folder(work, number)) for number in range(3)]
    thread, raised = in_background(work)
    try:
        wait_until(lambda: caplog.text.count("waits until that process ends") == 3)
        wait_until(lambda: RunFolder(folder(work, 3)).status.get("state") == "done")
        time.sleep(1.0)  # several looks at the locks
        assert thread.is_alive(), "the task ended while runs were still being written"
        assert not (folder(work) / "records.jsonl").exists()
        starts = [caplog.text.count(f"run {run.run_id} starts") for run in work.runs]
        assert starts == [1, 1, 1, 1], "no process is spent on looking"
        cancel(work, 2)
        released.end()
        finished.end(done=True)
        thread.join(300)
        assert not thread.is_alive(), "a cancelled run is no longer waited for"
    finally:
        for writer in writers:
            writer.process.kill()
            writer.process.wait()
    assert not raised
    assert [status(folder(work, number))["state"] for number in (0, 1, 3)] == ["done"] * 3
    assert [caplog.text.count(f"run {run.run_id} starts") for run in work.runs] == [2, 1, 1, 1]
    assert f"run {work.runs[1].run_id} is done" in caplog.text


# ---- a child, without its process -------------------------------------------------------------------------------


def exit_code(pack: Pack) -> int:
    """What the process of the pack's first run returns."""
    (run, *_) = pack.runs
    config = {**run.config, "force": pack.from_scratch}
    request = {"run_id": run.run_id, "config": config, "sweep": str(pack.sweep), "submission": pack.submission}
    return run_one.main(request)


def test_the_reason_of_a_failure_is_that_of_the_latest_submission(pack):
    assert exit_code(pack(DIVERGES)) == FAILED
    again = pack(f"{DIVERGES} device=cuda:99", submission="gsdg-s-1")  # fails before the run records anything itself
    assert "NonFinite" in status(folder(again))["reason"]
    assert exit_code(again) == FAILED
    assert "device=cuda:99" in status(folder(again))["reason"]
    log = (folder(again) / "log.txt").read_text()
    assert "device=cuda:99" in log[log.rindex("Traceback") :]
    again.runs = [FrozenRun("0123456789ab", [], again.runs[0].config)]
    assert exit_code(again) == FAILED
    assert "another code" in status(folder(again))["reason"], "the config has another id"


@pytest.fixture
def unwritable():
    """A function that makes a folder which nobody can write, not even root; how: in which of two ways."""
    undo: list[list[str]] = []

    def unwritable(place: Path, how: str) -> None:
        place.mkdir(parents=True)
        commands = {
            "immutable": (["chattr", "+i"], ["chattr", "-i"]),
            "read-only": (["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs"], ["umount"]),
        }
        make, restore = ([*command, str(place)] for command in commands[how])
        if subprocess.run(make, capture_output=True).returncode:
            pytest.skip(f"cannot make a folder {how} here (needs root)")
        undo.append(restore)

    yield unwritable
    for command in undo:
        subprocess.run(command, check=True)


def test_a_run_whose_folder_cannot_be_written_fails_with_its_reason(pack, unwritable):
    reasons = {"immutable": "Operation not permitted", "read-only": "Read-only"}
    for seed, (how, reason) in enumerate(reasons.items()):
        work = pack(f"seed={seed} {SHORT}")
        unwritable(folder(work), how)
        assert exit_code(work) == FAILED
        (run,) = run_states(work.runs, folder(work).parent, None)
        assert run.state == "failed"
        assert reason in run.reason


def reaped(work: Pack, code: str) -> list[FrozenRun]:
    """The runs that the pack starts again after the process of its first run has ended as this Python code does."""
    child = subprocess.Popen([sys.executable, "-c", code])
    child.wait()
    work._children[0] = work.runs[0], child
    return work._reap_children()


def test_a_run_whose_process_ends_with_a_signal_or_an_unknown_exit_code_is_restarted_failed_or_done(pack):
    """A child imports torch for some seconds before it installs its handlers; until then no work is lost."""
    work = pack(SHORT)
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        code = f"import os, signal; signal.signal({number}, signal.SIG_DFL); os.kill(os.getpid(), {number})"
        assert reaped(work, code) == work.runs, number
        assert not work._failed
        assert not folder(work).exists()
    assert reaped(work, f"raise SystemExit({DAMAGED})") == []
    assert work._failed == [work.runs[0].run_id]
    command = f"python -m gsdg.sweep retry s --runs-dir {work.sweep.parents[1]}"
    assert status(folder(work))["reason"].endswith(f"made again by: {command}")
    work._failed.clear()
    (folder(work) / "status.json").write_text('{"state": "done"}')
    assert reaped(work, "import os; os.abort()") == [], "the process crashed after it had finished the run"
    assert not work._failed
    assert status(folder(work))["state"] == "done"


# ---- what a pack reads and gives to its children ------------------------------------------------------------------


def test_a_run_is_cancelled_by_the_events_after_its_latest_submission(pack):
    work = pack(SHORT)
    sweep, ids = SweepFolder(work.sweep), [work.runs[0].run_id]
    cancel(work, 0)
    assert work._cancelled_runs() == set(ids)
    sweep.append("submitted", cluster="local", array="gsdg-s-7", packs=[ids])
    assert work._cancelled_runs() == set(ids), "another array's submission is not this one's"
    sweep.append("submitted", cluster="local", array=work.array, packs=[ids])
    assert work._cancelled_runs() == set()
    cancel(work, 0)
    assert work._cancelled_runs() == set(ids)


def test_runs_side_by_side_share_the_gpus_in_turn(pack):
    work = pack(SHORT, side_by_side=3, environment={"CUDA_VISIBLE_DEVICES": "4,7"})
    assert [work._child_environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "7", "4"]
    alone = pack(SHORT, environment={"CUDA_VISIBLE_DEVICES": "4,7", "HOME": None})
    assert alone._child_environment(0)["CUDA_VISIBLE_DEVICES"] == "4,7"
    assert "HOME" not in alone._child_environment(0)


def test_a_child_starts_no_more_threads_than_its_share_of_the_cores(pack, monkeypatch):
    """Some clusters do not bind a task to its cores, so torch would start one thread per core of the node."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    work = pack(SHORT)
    for allotted, side_by_side, chosen, threads in (
        (None, 1, None, None),
        (None, 2, None, "4"),
        ("4", 1, None, "4"),
        ("4", 3, None, "1"),
        ("16", 1, None, None),
        ("1", 2, None, "1"),
        ("4", 1, "2", "2"),
    ):
        for name, value in (("SLURM_CPUS_PER_TASK", allotted), ("OMP_NUM_THREADS", chosen)):
            monkeypatch.delenv(name, raising=False)
            if value:
                monkeypatch.setenv(name, value)
        work.side_by_side = side_by_side
        assert work._child_environment(0).get("OMP_NUM_THREADS") == threads, (allotted, side_by_side, chosen)


# ---- before the task is queued again ------------------------------------------------------------------------------


def test_a_job_waits_until_slurms_controller_answers_or_the_time_is_over(tmp_path, monkeypatch):
    calls, program = tmp_path / "calls", tmp_path / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\n[ "$(wc -l < {calls})" -gt 2 ] && state=UP || state=DOWN\n'
        'echo "Slurmctld(primary) at c0 is $state"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    task_process._wait_for_controller(60.0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    task_process._wait_for_controller(0.0)
    assert not calls.exists(), "outside of SLURM, and without time, nothing is asked"
    task_process._wait_for_controller(60.0)
    assert calls.read_text() == "ping\n" * 3
