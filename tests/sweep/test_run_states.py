"""How runs stand: what their folders, the sweeps' events and SLURM's queue say together."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from desk import HERE, Desk
from helpers import REPOSITORY

from gsdg.sweep import slurm
from gsdg.sweep.slurm import Queued
from gsdg.sweep.states import STATES, TO_SUBMIT, stand

LATER = "2026-02-02_10-00-00-222222"


def standings(sweep, queue):
    """How every run of the sweep stands."""
    return stand(sweep.runs(), sweep.runs_dir, queue)


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path / "runs")
    yield desk
    desk.clear()


@pytest.fixture
def sweep(desk):
    return desk.sweep(["a", "b", "c"])


def waiting(array: str, index: int = 0, **more: str) -> dict:
    """A queue that holds one task."""
    return {(array, index): Queued(**{"job": "7_0", "state": "PENDING", "reason": "Priority", "node": "", **more})}


def seen(sweep, queue: dict | None = None) -> dict[str, tuple[str, str]]:
    return {one.run_id: (one.state, one.reason) for one in standings(sweep, queue)}


# ---- the folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue", [{}, None])
def test_a_run_that_was_never_submitted_is_missing(sweep, queue):
    (one, *_) = standings(sweep, queue)
    assert (one.state, one.reason, one.step, one.steps, one.age, one.job) == ("missing", "", 0, 100, None, None)


def test_every_run_is_told_once_in_the_sweeps_order(desk):
    names = [f"{number:x}" for number in range(40, 0, -1)]
    assert [one.run_id for one in standings(desk.sweep(names), {})] == names


def test_a_done_run_is_done_whatever_was_submitted_or_cancelled_before(desk, sweep):
    array = desk.submitted(sweep, [["a"]], jobs=["7"])
    sweep.append("cancelled", runs=["a"])
    desk.run("a", "done", ago=100, steps=200, step=3, job="7", node="n1")
    (one, *_) = standings(sweep, waiting(array))
    assert (one.state, one.step, one.steps, one.job, one.host) == ("done", 200, 200, "7", "n1")
    assert one.age == pytest.approx(100, abs=5)


def test_a_working_process_is_running_and_a_killed_one_lost(desk, sweep):
    process = desk.working("a")
    assert seen(sweep, {})["a"] == ("running", "")
    process.kill()
    process.wait()
    state, reason = seen(sweep, {})["a"]
    assert state == "lost"
    assert reason.startswith("no heartbeat for ")


@pytest.mark.parametrize(("ago", "state"), [(100, "running"), (130, "lost")])
def test_elsewhere_the_heartbeat_decides(desk, sweep, ago, state):
    desk.run("a", "running", ago=ago, step=40, job="9_1", node="n3")
    (one, *_) = standings(sweep, {})
    assert (one.state, one.step, one.job, one.host) == (state, 40, "9_1", "n3")
    assert one.reason == ("" if state == "running" else "no heartbeat for 2 min")


def test_a_failure_is_told_by_its_first_line(desk, sweep):
    desk.run("a", "failed", reason="ValueError: one\ntwo")
    desk.run("b", "failed", reason=None)
    assert seen(sweep, {})["a"] == ("failed", "ValueError: one")
    assert seen(sweep, {})["b"] == ("failed", "no reason noted")


def test_a_run_that_saved_itself_and_that_nothing_resumes_is_stopped(desk, sweep):
    desk.run("a", "stopped", reason="SIGINT on desk: saved after 3 of 100 steps")
    assert seen(sweep, {})["a"] == ("stopped", "SIGINT on desk: saved after 3 of 100 steps")


def test_a_broken_status_is_no_sign_of_life(desk, sweep):
    (desk.run("a", "done") / "status.json").write_text('{"state": "do')
    assert seen(sweep, {})["a"] == ("missing", "")


# ---- the queue ----------------------------------------------------------------------------------------------------


def test_a_queued_run_is_pending_with_slurms_reason_and_job(desk, sweep):
    array = desk.submitted(sweep, [["a"], ["b"]])  # never noted as accepted: the queue knows its number
    (one, two, three) = standings(sweep, waiting(array, 1, job="7_1", reason="Resources"))
    assert (two.state, two.reason, two.job, two.host) == ("pending", "PENDING (Resources)", "7_1", None)
    assert one.state == "lost"
    assert three.state == "missing"


def test_of_a_task_at_work_the_first_run_is_starting_and_the_others_wait_their_turn(desk, sweep):
    array = desk.submitted(sweep, [["a", "b", "c"]], jobs=["7"])
    desk.run("c", "done", submission=array)
    queue = waiting(array, state="RUNNING", reason="", node="n2")
    assert seen(sweep, queue) == {
        "a": ("pending", "starting"),
        "b": ("pending", "waits its turn in its task"),
        "c": ("done", ""),
    }
    assert standings(sweep, queue)[1].host == "n2"


@pytest.mark.parametrize("sign", [{"ago": 10}, {"ago": 900, "submission": "this"}], ids=["by time", "by name"])
def test_a_run_that_failed_in_this_task_is_failed_while_the_task_goes_on(desk, sweep, sign):
    array = desk.submitted(sweep, [["a", "b"]], jobs=["7"], ago=500)
    sign = {key: array if value == "this" else value for key, value in sign.items()}  # that node's clock is late
    desk.run("a", "failed", reason="OSError: disk", **sign)
    assert seen(sweep, waiting(array, state="RUNNING"))["a"] == ("failed", "OSError: disk")


@pytest.mark.parametrize("state", ["failed", "stopped", "running", "done"])
def test_what_the_folder_said_before_the_submission_no_longer_counts(desk, sweep, state):
    desk.run("a", state, ago=900, reason="old")
    array = desk.submitted(sweep, [["a"]], jobs=["7"], ago=500)
    assert seen(sweep, waiting(array))["a"] == ("pending", "PENDING (Priority)")
    assert seen(sweep, None)["a"] == ("pending", "SLURM does not answer")


@pytest.mark.parametrize("state", ["stopped", "running"])
def test_a_run_whose_task_was_requeued_is_pending(desk, sweep, state):
    array = desk.submitted(sweep, [["a"]], jobs=["7"], ago=5000)
    desk.run("a", state, ago=200, step=33, job="7", node="n1")
    (one, *_) = standings(sweep, waiting(array, reason="BeginTime"))
    assert (one.state, one.reason, one.step, one.host) == ("pending", "PENDING (BeginTime)", 33, None)


def test_without_an_answer_of_slurm_the_disk_is_told_with_doubt(desk, sweep):
    desk.submitted(sweep, [["a"], ["b"], ["c"]], jobs=["7_0", "7_1", "7_2"], ago=5000)
    desk.run("a", "stopped", ago=300, reason="SIGUSR2 on n1: saved")
    desk.run("b", "running", ago=300)
    desk.run("c", "failed", ago=300, reason="OSError")
    assert seen(sweep, None) == {
        "a": ("stopped", "SIGUSR2 on n1: saved (SLURM does not answer)"),
        "b": ("lost", "no heartbeat for 5 min (SLURM does not answer)"),
        "c": ("failed", "OSError"),
    }


def test_a_run_gone_from_the_queue_without_a_trace_is_lost(desk, sweep):
    desk.submitted(sweep, [["a"]], jobs=["7"], ago=600)
    assert seen(sweep, {})["a"] == ("lost", "submitted 10 min ago, gone from SLURM's queue without a trace")


def test_a_lost_run_has_the_last_words_of_its_job(desk, sweep):
    desk.submitted(sweep, [["a"], ["b"]], jobs=["7_0", "7_1"], ago=600)
    desk.run("b", "running", ago=300, job="7_1")
    sweep.jobs.mkdir()
    for job in ("7_0", "7_1"):
        words = "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T10:00:00 DUE TO TIME LIMIT ***\n"
        sweep.log_of(job).write_text("submitit INFO: ...\n" + words)
    for run_id in "ab":
        state, reason = seen(sweep, {})[run_id]
        assert state == "lost"
        assert "time limit" in reason.lower()


def test_logs_are_read_for_lost_runs_only_and_once_a_pack(desk, sweep, monkeypatch):
    array = desk.submitted(sweep, [["a", "b"], ["c"]], jobs=["7_0", "7_1"])
    read = []
    monkeypatch.setattr(slurm, "last_words", lambda log: read.append(log) or "killed")
    standings(sweep, waiting(array, 1, job="7_1"))
    assert read == [sweep.log_of("7_0")]


@pytest.mark.parametrize(("ago", "expected"), [(20, "pending"), (90, "lost")])
def test_what_is_being_submitted_has_a_minute_to_reach_the_queue(desk, sweep, ago, expected):
    desk.submitted(sweep, [["a"]], ago=ago)
    assert seen(sweep, {})["a"][0] == expected


def test_what_slurm_has_accepted_and_lost_at_once_is_lost(desk, sweep):
    desk.submitted(sweep, [["a"]], ago=20, jobs=["7"])
    assert seen(sweep, {})["a"][0] == "lost"


# ---- several submissions ------------------------------------------------------------------------------------------


def test_a_run_queued_by_another_sweep_is_pending_here_too(desk, sweep):
    other = desk.sweep(["x", "b"], LATER)
    array = desk.submitted(other, [["x"], ["b"]], jobs=["9_0", "9_1"])
    assert seen(sweep, waiting(array, 1))["b"] == ("pending", "PENDING (Priority)")
    assert seen(other, waiting(array, 1))["x"][0] == "lost"
    assert seen(sweep, {})["b"][0] == "lost"


def test_the_latest_submission_counts_but_one_still_queued_before_it(desk, sweep):
    first = desk.submitted(sweep, [["a"]], jobs=["7"], ago=900)
    second = desk.submitted(sweep, [["a"]], jobs=["8"], ago=500, number=1)
    both = {**waiting(first, job="7"), **waiting(second, job="8")}
    assert [standings(sweep, queue)[0].job for queue in (both, waiting(first, job="7"))] == ["8", "7"]
    desk.run("a", "failed", ago=700)
    assert seen(sweep, both)["a"][0] == "pending"
    assert seen(sweep, waiting(first))["a"][0] == "failed"


def test_the_latest_submission_may_be_of_an_older_sweep(desk, sweep):
    desk.submitted(desk.sweep(["a"], LATER), [["a"]], jobs=["7"], ago=900)
    desk.submitted(sweep, [["a"]], jobs=["8"], ago=500)
    assert standings(sweep, {})[0].job == "8"


def test_runs_without_a_sweep_can_be_asked_about(desk, sweep):
    desk.submitted(sweep, [["a"]], jobs=["7"])
    desk.run("b", "done")
    assert [one.state for one in stand(sweep.runs(), desk.runs_dir, {})] == ["lost", "done", "missing"]
    assert [one.state for one in stand(sweep.runs(), desk.runs_dir / "none", {})] == ["missing"] * 3


# ---- cancelled ----------------------------------------------------------------------------------------------------


def test_a_run_cancelled_after_its_submission_is_cancelled_even_while_its_task_has_others(desk, sweep):
    array = desk.submitted(sweep, [["a", "b"]], jobs=["7"])
    sweep.append("cancelled", runs=["a"])
    queue = waiting(array)
    assert (seen(sweep, queue)["a"], seen(sweep, queue)["b"][0]) == (("cancelled", ""), "pending")
    assert seen(sweep, {})["a"] == ("cancelled", "")
    assert seen(sweep, None)["a"] == ("cancelled", "")


def test_a_run_submitted_after_it_was_cancelled_is_pending(desk, sweep):
    desk.submitted(sweep, [["a"]], jobs=["7"], ago=900)
    sweep.append("cancelled", runs=["a"], time=desk.now - 700)
    other = desk.sweep(["a"], LATER)
    array = desk.submitted(other, [["a"]], jobs=["8"], ago=500)
    assert seen(sweep, waiting(array))["a"][0] == "pending"


def test_a_cancelled_run_is_running_until_its_process_or_its_task_is_gone(desk, sweep):
    array = desk.submitted(sweep, [["a"]], jobs=["7"])
    desk.run("a", "running", ago=20, job="7", submission=array)
    sweep.append("cancelled", runs=["a"])
    assert seen(sweep, waiting(array, state="RUNNING"))["a"] == ("running", "cancelled: about to stop")
    assert seen(sweep, {})["a"] == ("cancelled", "")  # its last heartbeat is still young
    assert seen(sweep, None)["a"][0] == "running"


def test_a_cancelled_run_that_someone_runs_by_hand_is_running(desk, sweep):
    desk.submitted(sweep, [["a"], ["b"]], jobs=["7_0", "7_1"])
    sweep.append("cancelled", runs=["a", "b", "c"])
    desk.run("a", "running", ago=20, submission=None)
    assert seen(sweep, {})["a"][0] == "running"
    assert seen(sweep, {})["c"][0] == "cancelled"  # nothing noted that it was submitted


def test_a_cancelled_run_of_this_machine_is_running_while_its_process_lives(desk, sweep):
    array = desk.submitted(sweep, [["a"]], jobs=["999999999"], cluster="local")
    sweep.append("cancelled", runs=["a"])
    desk.run("a", "running", ago=20, submission=array)
    assert seen(sweep, {})["a"][0] == "running"


# ---- without SLURM ------------------------------------------------------------------------------------------------

SLEEPING = "import time; print('ready'); time.sleep(600)"


def test_a_task_on_this_machine_waits_while_its_process_lives(desk, sweep):
    process = desk.process(SLEEPING, str(sweep.jobs))
    desk.submitted(sweep, [["a", "b"]], jobs=[str(process.pid)], cluster="local")
    assert seen(sweep, None)["b"] == ("pending", "waits its turn in its task")
    process.kill()
    process.wait()
    assert seen(sweep, None)["b"] == ("lost", "submitted 8 min ago, its process is gone without a trace")


def test_a_number_that_another_process_has_by_now_is_no_task(desk, sweep):
    process = desk.process(SLEEPING)
    desk.submitted(sweep, [["a"]], jobs=[str(process.pid)], cluster="local", host=HERE)
    assert seen(sweep, None)["a"][0] == "lost"


@pytest.mark.parametrize(("ago", "state"), [(10, "pending"), (500, "lost")])
def test_a_task_on_another_machine_lives_while_one_of_its_runs_beats(desk, sweep, ago, state):
    desk.submitted(sweep, [["a", "b"]], jobs=["1"], cluster="local", host="elsewhere")
    desk.run("a", "running", ago=ago)
    assert seen(sweep, None)["b"][0] == state


# ---- all of them --------------------------------------------------------------------------------------------------


def test_what_is_submitted_again():
    assert set(STATES) == TO_SUBMIT["all"] | {"running", "pending"}
    assert TO_SUBMIT["failed"] - TO_SUBMIT["missing"] == {"failed"}
    assert TO_SUBMIT["missing"] == {"missing", "lost", "stopped", "cancelled"}


def test_a_queue_is_no_heavy_import():
    code = (
        "import sys, gsdg.sweep.__main__, gsdg.sweep.table; print({'torch', 'pandas', 'submitit'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_of_many_runs_every_file_is_read_once(desk, monkeypatch):
    """On a network file system each costs milliseconds: one status a run that exists, a sweep's events once."""
    names = [f"{number:012x}" for number in range(1000)]
    sweep = desk.sweep(names)
    array = desk.submitted(sweep, [[name] for name in names], jobs=[f"7_{index}" for index in range(len(names))])
    for index, name in enumerate(names[:900]):
        desk.run(name, ("done", "failed", "running")[index % 3], reason="OSError: disk", steps=100, submission=array)
    queue = {key: value for index in range(900, 990) for key, value in waiting(array, index).items()}
    runs, opened = sweep.runs(), []
    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *more: opened.append(path) or read_text(path, *more))
    found = Counter(one.state for one in stand(runs, sweep.runs_dir, queue))
    assert found == {"done": 300, "failed": 300, "running": 300, "pending": 90, "lost": 10}
    assert Counter(path.name for path in opened) == {"status.json": 900, "events.jsonl": 1}
