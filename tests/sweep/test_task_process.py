"""A task's supervisor with real children, and no SLURM: the test plays submitit."""

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
from helpers import SMALL, status

from gsdg.experiment import prepare
from gsdg.runs import RunFolder
from gsdg.sweep.folder import Frozen, SweepFolder
from gsdg.sweep.job import Pack, PackFailed, TakenOver

pytestmark = pytest.mark.slow
LONG = ("trainer.steps=100000", "trainer.eval_every=100000", "trainer.log_every=1")


@pytest.fixture
def pack(compose, tmp_path) -> Callable[..., Pack]:
    """A pack of runs, each given by its overrides (as one string)."""

    def pack(*runs: str, side_by_side: int = 1, **more: object) -> Pack:
        plans = [prepare(compose(*SMALL, *text.split())) for text in runs]
        frozen = [Frozen(plan.run_id, text.split(), plan.config) for plan, text in zip(plans, runs, strict=True)]
        sweep = SweepFolder(tmp_path / "runs" / ".sweeps" / "s")
        sweep.write({}, frozen)
        sweep.append("submitted", array="gsdg-s-0", packs=[[run.run_id for run in frozen]])
        options = {"grace": 60.0, **more}
        return Pack(sweep.path, "gsdg-s-0", "gsdg-s-0", frozen, side_by_side, **options)

    return pack


def folder(pack: Pack, number: int) -> Path:
    return Path(pack.runs[number].config["runs_dir"]) / pack.runs[number].run_id


def in_background(pack: Pack) -> tuple[threading.Thread, list]:
    """The pack at work in a thread; what it raises goes into the list."""
    raised: list = []

    def work() -> None:
        try:
            pack()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, raised


def wait_for_step(pack: Pack, number: int, step: int = 5) -> None:
    log = folder(pack, number) / "log.txt"
    end = time.monotonic() + 300
    while not (log.exists() and f"step {step}/" in log.read_text()):
        assert time.monotonic() < end, "the run does not start"
        time.sleep(0.05)


def test_one_failure_neither_stops_nor_hides_the_others(pack):
    work = pack("trainer.steps=2", "trainer.steps=9 optimizer=sgd optimizer.lr=1e30", "trainer.steps=3")
    with pytest.raises(PackFailed, match=f"1 of 3 runs failed: {work.runs[1].run_id}"):
        work()
    assert [status(folder(work, number))["state"] for number in range(3)] == ["done", "failed", "done"]
    assert status(folder(work, 0))["submission"] == "gsdg-s-0"


def test_asked_by_submitit_every_child_saves_and_the_next_start_goes_on(pack):
    work = pack("seed=0 " + " ".join(LONG), "seed=1 " + " ".join(LONG), side_by_side=2)
    thread, raised = in_background(work)
    for number in (0, 1):
        wait_for_step(work, number)
    delayed = work.checkpoint()
    assert [status(folder(work, number))["state"] for number in (0, 1)] == ["stopped", "stopped"]
    saved = [int(next((folder(work, n) / "checkpoints").glob("*.pt")).stem.removeprefix("step_")) for n in (0, 1)]
    again = pickle.loads(pickle.dumps(delayed)).function
    thread.join(1)  # it starts them again: nobody has ended it as submitit would
    for child in [child for _, child in work._children.values()]:
        child.kill()
    thread.join(60)
    assert again.runs == work.runs
    assert not again._children
    thread, _ = in_background(again)
    for number, step in enumerate(saved):
        wait_for_step(again, number, step + 3)
        assert f"resuming at step {step} " in (folder(work, number) / "log.txt").read_text()
    SweepFolder(again.sweep).append("cancelled", runs=[run.run_id for run in again.runs])
    thread.join(60)
    assert not thread.is_alive()


def test_a_child_that_is_killed_is_failed_and_says_by_what(pack):
    work = pack(" ".join(LONG), "seed=1 trainer.steps=2")
    thread, raised = in_background(work)
    wait_for_step(work, 0)
    os.kill(status(folder(work, 0))["pid"], signal.SIGKILL)
    thread.join(300)
    assert isinstance(raised[0], PackFailed)
    assert status(folder(work, 0))["state"] == "failed"
    assert "SIGKILL" in status(folder(work, 0))["reason"]
    assert status(folder(work, 1))["state"] == "done"


def test_a_run_that_was_done_before_its_process_crashed_is_done(pack):
    work = pack("trainer.steps=2")
    work()
    work._failed.clear()
    child = subprocess.Popen([sys.executable, "-c", "import os; os.abort()"])
    child.wait()
    work._children[0] = work.runs[0], child
    assert work._ended() == []
    assert status(folder(work, 0))["state"] == "done"
    assert not work._failed


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_a_child_that_was_signalled_before_it_could_listen_is_started_again(pack, number):
    """It imports torch for some seconds: nothing is lost, and nothing has failed."""
    work = pack("trainer.steps=2")
    child = subprocess.Popen([sys.executable, "-c", f"import os, signal; signal.signal({number}, signal.SIG_DFL); "
                                                     f"os.kill(os.getpid(), {number})"])  # fmt: skip
    child.wait()
    work._children[0] = work.runs[0], child
    assert work._ended() == work.runs
    assert not work._failed
    assert not folder(work, 0).exists()


def test_a_cancelled_run_stops_and_leaves_its_place_to_the_next(pack, caplog):
    caplog.set_level("INFO")
    work = pack(" ".join(LONG), "seed=1 trainer.steps=2", "seed=2 trainer.steps=2")
    SweepFolder(work.sweep).append("cancelled", runs=[work.runs[2].run_id])
    thread, raised = in_background(work)
    wait_for_step(work, 0)
    SweepFolder(work.sweep).append("cancelled", runs=[work.runs[0].run_id])
    thread.join(300)
    assert not raised
    assert status(folder(work, 0))["state"] == "stopped"
    assert status(folder(work, 1))["state"] == "done"
    assert f"run {work.runs[1].run_id} starts" in caplog.text
    assert f"run {work.runs[2].run_id} starts" not in caplog.text


def test_what_was_cancelled_before_this_submission_is_wanted_again(pack):
    work = pack("trainer.steps=2")
    sweep, ids = SweepFolder(work.sweep), [run.run_id for run in work.runs]
    sweep.append("cancelled", runs=ids)
    assert work._cancelled() == set(ids)
    sweep.append("submitted", array="gsdg-s-7", packs=[ids])
    assert work._cancelled() == set(ids), "another array's submission is not this one's"
    sweep.append("submitted", array=work.array, packs=[ids])
    assert work._cancelled() == set()
    sweep.append("cancelled", runs=ids)
    assert work._cancelled() == set(ids)


def test_a_run_taken_over_by_another_copy_of_the_task_ends_this_one(pack, compose):
    work = pack(" ".join(LONG), "seed=1 trainer.steps=2")
    thread, raised = in_background(work)
    wait_for_step(work, 0)
    run = RunFolder(folder(work, 0))
    (run.path / "lock").write_text('{"token": "another", "host": "n2", "pid": 1, "process_start": null}')
    thread.join(300)
    assert isinstance(raised[0], TakenOver)
    assert not folder(work, 1).exists(), "the orphan must not begin another run"


def test_a_run_that_somebody_else_writes_is_left_to_him(pack):
    work = pack(" ".join(LONG), "seed=1 trainer.steps=2")
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from gsdg.runs import RunFolder\nwith RunFolder({str(folder(work, 0))!r}).hold(): input()",
        ],
        stdin=subprocess.PIPE,
    )
    try:
        end = time.monotonic() + 300
        while not (folder(work, 0) / "lock").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        work()
    finally:
        other.communicate(b"\n")
    assert status(folder(work, 1))["state"] == "done"
    assert not (folder(work, 0) / "records.jsonl").exists()


def test_done_runs_are_not_started_unless_they_are_to_be_made_afresh_and_then_once(pack):
    work = pack("trainer.steps=2")
    work()
    first = status(folder(work, 0))["started"]
    work()
    assert status(folder(work, 0))["started"] == first
    afresh = pack("trainer.steps=2", afresh=True)
    afresh.submission = "gsdg-s-1"
    afresh()
    second = status(folder(work, 0))["started"]
    assert second > first
    afresh()  # the task was queued again
    assert status(folder(work, 0))["started"] == second


def test_those_side_by_side_share_the_gpus_in_turn(pack):
    work = pack("trainer.steps=2", side_by_side=3, environment={"CUDA_VISIBLE_DEVICES": "4,7"})
    assert [work._child_environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "7", "4"]
    alone = pack("trainer.steps=2", environment={"CUDA_VISIBLE_DEVICES": "4,7", "HOME": None})
    assert alone._child_environment(0)["CUDA_VISIBLE_DEVICES"] == "4,7"
    assert "HOME" not in alone._child_environment(0)


@pytest.mark.parametrize(
    ("allotted", "side_by_side", "own", "threads"),
    [(None, 1, None, None), (None, 2, None, "4"), ("4", 1, None, "4"), ("4", 3, None, "1"), ("16", 1, None, None),
     ("1", 2, None, "1"), ("4", 1, "2", "2")],
)  # fmt: skip
def test_a_child_starts_no_more_threads_than_its_share_of_the_cores(
    pack, monkeypatch, allotted, side_by_side, own, threads
):
    """Some clusters do not bind a task to its cores: each would start a thread for every core of the node."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name, value in (("SLURM_CPUS_PER_TASK", allotted), ("OMP_NUM_THREADS", own)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    work = pack("trainer.steps=2", side_by_side=side_by_side)
    assert work._child_environment(0).get("OMP_NUM_THREADS") == threads


def test_an_old_failure_does_not_hide_the_new_one(pack):
    """The second submission fails before the run has its folder."""
    work = pack("trainer.steps=9 optimizer=sgd optimizer.lr=1e30")
    with pytest.raises(PackFailed):
        work()
    assert "NonFinite" in status(folder(work, 0))["reason"]
    again = pack("trainer.steps=9 optimizer=sgd optimizer.lr=1e30 device=cuda:99")
    again.submission = "gsdg-s-1"
    with pytest.raises(PackFailed):
        again()
    assert "device=cuda:99" in status(folder(work, 0))["reason"]


def test_a_config_whose_id_is_not_its_own_is_refused(pack):
    work = pack("trainer.steps=2")
    work.runs = [Frozen("0123456789ab", [], work.runs[0].config)]
    with pytest.raises(PackFailed):
        work()
    assert "another code" in status(folder(work, 0))["reason"]
