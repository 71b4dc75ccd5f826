"""Run states, derived from the runs' folders, the sweeps' events and SLURM's queue."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from desk import HERE, Desk, script

from gsdg.sweep import slurm
from gsdg.sweep.run_states import STATES, TO_SUBMIT, run_states
from gsdg.sweep.slurm import QueuedTask
from gsdg.sweep.submissions import History
from gsdg.utils.json_files import write_json

LATER = "2026-02-02_10-00-00-222222"


def standings(sweep, queue):
    """The state of every run of the sweep."""
    return run_states(sweep.runs(), sweep.runs_dir, queue)


@pytest.fixture
def sweep(desk):
    return desk.sweep(["a", "b", "c"])


def waiting(sweep, array: str, job: str = "7", **more: str) -> dict:
    """A queue with one task, which is recognised by its batch script and not by the job's name."""
    fields = {"state": "PENDING", "reason": "Priority", "node": "", **more}
    return {job: QueuedTask(job, **fields, script=str(script(sweep, array)))}


def seen(sweep, queue: dict | None = None) -> dict[str, tuple[str, str]]:
    return {one.run_id: (one.state, one.reason) for one in standings(sweep, queue)}


# ---- the folder ---------------------------------------------------------------------------------------------------


def test_runs_that_were_never_submitted_are_missing_and_each_is_listed_once_in_the_sweeps_order(desk):
    names = [f"{number:x}" for number in range(40, 0, -1)]
    for queue in ({}, None):
        found = standings(desk.sweep(names), queue)
        assert [run.run_id for run in found] == names
        assert {(run.state, run.reason, run.step, run.steps, run.age, run.job) for run in found} == {
            ("missing", "", 0, 100, None, None)
        }


def test_a_done_run_is_done_whatever_was_submitted_or_cancelled_before(desk, sweep):
    array = desk.submitted(sweep, [["a"]], jobs=["7"])
    sweep.append("cancelled", runs=["a"])
    desk.run("a", "done", ago=100, steps=200, step=3, job="7", node="n1")
    (run, *_) = standings(sweep, waiting(sweep, array))
    assert (run.state, run.step, run.steps, run.job, run.host) == ("done", 200, 200, "7", "n1")
    assert run.age == pytest.approx(100, abs=5)


def test_a_working_process_is_running_and_a_killed_one_lost(desk, sweep):
    process = desk.working("a")
    assert seen(sweep, {})["a"] == ("running", "")
    process.kill()
    process.wait()
    state, reason = seen(sweep, {})["a"]
    assert state == "lost"
    assert reason.startswith("no heartbeat for ")


def test_on_another_host_the_heartbeat_decides(desk, sweep):
    for ago, state, reason in ((100, "running", ""), (130, "lost", "no heartbeat for 2 min")):
        desk.run("a", "running", ago=ago, step=40, job="9_1", node="n3")
        (run, *_) = standings(sweep, {})
        assert (run.state, run.reason, run.step, run.job, run.host) == (state, reason, 40, "9_1", "n3")


def test_failed_and_stopped_runs_have_the_first_line_of_their_reason_and_a_broken_status_counts_as_none(desk, sweep):
    desk.run("a", "failed", reason="ValueError: one\ntwo")
    desk.run("b", "failed", reason=None)
    desk.run("c", "stopped", reason="SIGINT on desk: saved after 3 of 100 steps")
    assert seen(sweep, {}) == {
        "a": ("failed", "ValueError: one"),
        "b": ("failed", "no reason noted"),
        "c": ("stopped", "SIGINT on desk: saved after 3 of 100 steps"),
    }
    (desk.run("a", "done") / "status.json").write_text('{"state": "do')
    assert seen(sweep, {})["a"] == ("missing", "")


# ---- the queue ----------------------------------------------------------------------------------------------------


def test_a_queued_run_is_pending_with_slurms_reason_and_job(desk, sweep):
    array = desk.submitted(sweep, [["a"], ["b"]])  # never noted as accepted: only the queue has its number
    (a, b, c) = standings(sweep, waiting(sweep, array, "7_1", reason="Resources"))
    assert (b.state, b.reason, b.job, b.host) == ("pending", "PENDING (Resources)", "7_1", None)
    assert (a.state, c.state) == ("lost", "missing")


def test_of_a_task_at_work_the_first_run_is_starting_and_the_others_wait_their_turn(desk, sweep):
    array = desk.submitted(sweep, [["a", "b", "c"]], jobs=["7"])
    desk.run("c", "done", submission=array)
    queue = waiting(sweep, array, state="RUNNING", reason="", node="n2")
    assert seen(sweep, queue) == {
        "a": ("pending", "starting"),
        "b": ("pending", "waits for earlier runs of its task"),
        "c": ("done", ""),
    }
    assert standings(sweep, queue)[1].host == "n2"


def test_a_run_that_failed_in_this_task_is_failed_while_the_task_goes_on(desk, sweep):
    array = desk.submitted(sweep, [["a", "b"]], jobs=["7"], ago=500)
    for ago in (10, 900, -3600):  # the clock of the node: equal to this one's, behind it, ahead of it
        desk.run("a", "failed", reason="OSError: disk", ago=ago, submission=array)
        assert seen(sweep, waiting(sweep, array, state="RUNNING"))["a"] == ("failed", "OSError: disk"), ago


def test_a_status_of_before_the_submission_no_longer_counts(desk, sweep):
    """Also if clocks differ: a run that is queued again must not be submitted a third time."""
    earlier = desk.submitted(sweep, [["a"]], jobs=["6"], ago=1000)
    array = desk.submitted(sweep, [["a"]], jobs=["7"], ago=500, number=1, done_before=["a"])
    written = [(state, ago) for state in ("failed", "stopped", "done") for ago in (900, 440, -3600)]
    for state, ago in [("running", 900), *written]:
        desk.run("a", state, ago=ago, reason="old", submission=earlier)
        assert seen(sweep, waiting(sweep, array))["a"] == ("pending", "PENDING (Priority)"), (state, ago)
        assert seen(sweep, None)["a"] == ("pending", "SLURM does not answer"), (state, ago)


def test_while_its_task_waits_a_run_that_failed_outside_of_these_sweeps_is_pending_and_one_done_by_hand_is_done(
    desk, sweep
):
    array = desk.submitted(sweep, [["a"]], jobs=["7"], ago=500)
    for submission in (None, "gsdg-a sweep that was removed-0"):
        desk.run("a", "failed", ago=100, submission=submission)
        assert seen(sweep, waiting(sweep, array))["a"] == ("pending", "PENDING (Priority)"), submission
    desk.run("a", "done", ago=3600, submission=None)  # on a host whose clock is behind
    assert seen(sweep, waiting(sweep, array))["a"] == ("done", "")


def test_a_run_whose_task_was_requeued_is_pending(desk, sweep):
    array = desk.submitted(sweep, [["a"]], jobs=["7"], ago=5000)
    for state in ("stopped", "running"):
        desk.run("a", state, ago=200, step=33, job="7", node="n1")
        (run, *_) = standings(sweep, waiting(sweep, array, reason="BeginTime"))
        assert (run.state, run.reason, run.step, run.host) == ("pending", "PENDING (BeginTime)", 33, None)


def test_without_an_answer_of_slurm_the_files_are_shown_with_doubt(desk, sweep):
    array = desk.submitted(sweep, [["a"], ["b"], ["c"]], jobs=["7_0", "7_1", "7_2"], ago=5000)
    desk.run("a", "stopped", ago=300, reason="SIGUSR2 on n1: saved", submission=array)
    desk.run("b", "running", ago=300, submission=array)
    desk.run("c", "failed", ago=300, reason="OSError", submission=array)
    assert seen(sweep, None) == {
        "a": ("stopped", "SIGUSR2 on n1: saved (SLURM does not answer)"),
        "b": ("lost", "no heartbeat for 5 min (SLURM does not answer)"),
        "c": ("failed", "OSError"),
    }


def test_a_run_gone_from_the_queue_is_lost_with_the_reason_in_the_log_of_its_job(desk, sweep):
    desk.submitted(sweep, [["a"], ["b"]], jobs=["7_0", "7_1"], ago=600)
    assert seen(sweep, {})["a"] == ("lost", "submitted 10 min ago, gone from SLURM's queue without a trace")
    desk.run("b", "running", ago=300, job="7_1")
    for job in ("7_0", "7_1"):
        end = "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T10:00:00 DUE TO TIME LIMIT ***\n"
        sweep.log_of(job).write_text("submitit INFO: ...\n" + end)
    for run_id in "ab":
        state, reason = seen(sweep, {})[run_id]
        assert state == "lost"
        assert "time limit" in reason.lower()


def test_logs_are_read_for_lost_runs_only_and_once_a_pack(desk, sweep, monkeypatch):
    array = desk.submitted(sweep, [["a", "b"], ["c"]], jobs=["7_0", "7_1"])
    read = []
    monkeypatch.setattr(slurm, "termination_reason", lambda log: read.append(log) or "killed")
    standings(sweep, waiting(sweep, array, "7_1"))
    assert read == [sweep.log_of("7_0")]


def test_a_submission_has_a_minute_to_reach_the_queue_unless_slurm_has_accepted_it(desk, sweep):
    desk.submitted(sweep, [["a"]], ago=20)
    desk.submitted(sweep, [["b"]], ago=90, number=1)
    desk.submitted(sweep, [["c"]], ago=20, number=2, jobs=["7"])
    assert [state for state, _ in seen(sweep, {}).values()] == ["pending", "lost", "lost"]
    desk.submitted(sweep, [["a"]], ago=-3600, number=3)  # on a host whose clock is ahead
    assert seen(sweep, {})["a"] == ("lost", "submitted 0 s ago, gone from SLURM's queue without a trace")


# ---- several submissions ------------------------------------------------------------------------------------------


def test_a_run_queued_by_another_sweep_is_pending_here_too(desk, sweep):
    other = desk.sweep(["x", "b"], LATER)
    array = desk.submitted(other, [["x"], ["b"]], jobs=["9_0", "9_1"])
    assert seen(sweep, waiting(other, array, "9_1"))["b"] == ("pending", "PENDING (Priority)")
    assert seen(other, waiting(other, array, "9_1"))["x"][0] == "lost"
    assert seen(sweep, {})["b"][0] == "lost"


def test_the_latest_submission_counts_but_one_still_queued_before_it(desk, sweep):
    first = desk.submitted(sweep, [["a"]], jobs=["7"], ago=900)
    second = desk.submitted(sweep, [["a"]], jobs=["8"], ago=500, number=1)
    both = {**waiting(sweep, first, job="7"), **waiting(sweep, second, job="8")}
    assert [standings(sweep, queue)[0].job for queue in (both, waiting(sweep, first, job="7"))] == ["8", "7"]
    desk.run("a", "failed", ago=700, submission=first)
    assert seen(sweep, both)["a"][0] == "pending"
    assert seen(sweep, waiting(sweep, first))["a"][0] == "failed"


def test_the_latest_submission_may_be_of_an_older_sweep(desk, sweep):
    desk.submitted(desk.sweep(["a"], LATER), [["a"]], jobs=["7"], ago=900)
    desk.submitted(sweep, [["a"]], jobs=["8"], ago=500)
    assert standings(sweep, {})[0].job == "8"


def test_runs_without_a_sweep_have_states(desk, sweep):
    desk.submitted(sweep, [["a"]], jobs=["7"])
    desk.run("b", "done")
    assert [run.state for run in run_states(sweep.runs(), desk.runs_dir, {})] == ["lost", "done", "missing"]
    assert [run.state for run in run_states(sweep.runs(), desk.runs_dir / "none", {})] == ["missing"] * 3


# ---- whose job it is --------------------------------------------------------------------------------------------


def test_of_arrays_whose_numbers_were_never_noted_each_is_known_by_its_batch_script(desk, sweep):
    """The launching process was killed between sbatch's answer and the note, twice."""
    first = desk.submitted(sweep, [["a"], ["b"]])
    second = desk.submitted(sweep, [["c"]], number=1)
    queue = {**waiting(sweep, first, "7_1"), **waiting(sweep, second, "8")}
    found = standings(sweep, queue)
    assert [(run.state, run.job) for run in found] == [("lost", None), ("pending", "7_1"), ("pending", "8")]
    (task,) = History(desk.runs_dir, queue).active_tasks(["a", "b"])
    assert task.job == "7_1"


def test_a_job_that_has_the_number_of_a_lost_one_is_not_it(desk, sweep):
    """SLURM uses numbers again when its controller was killed before it saved them."""
    desk.submitted(sweep, [["a"]], jobs=["7"], ago=600)
    other = desk.sweep(["x"], LATER)
    queue = waiting(other, desk.submitted(other, [["x"]], jobs=["7"]))
    assert seen(sweep, queue)["a"][0] == "lost"
    assert seen(other, queue)["x"][0] == "pending"
    assert History(desk.runs_dir, queue).active_tasks(["a"]) == []
    foreign = {"7": QueuedTask("7", "RUNNING", "", "n1", "/home/me/something_else.sh")}
    assert seen(sweep, foreign)["a"][0] == "lost"
    second = desk.submitted(sweep, [["b"]], jobs=["7"], number=1)
    assert [state for state, _ in seen(sweep, waiting(sweep, second)).values()] == ["lost", "pending", "missing"]


def test_a_sweep_seen_through_another_mount_is_recognised(desk, sweep):
    array = desk.submitted(sweep, [["a"]])
    elsewhere = f"/net/server/export/runs/.sweeps/{sweep.name}/jobs/{script(sweep, array).name}"
    queue = {"7": QueuedTask("7", "PENDING", "Priority", "", elsewhere)}
    assert seen(sweep, queue)["a"] == ("pending", "PENDING (Priority)")


# ---- clocks: hosts' differ by up to an hour -----------------------------------------------------------------------


@pytest.fixture
def clocks(tmp_path):
    """[(how many seconds the other host's clock is ahead, a new desk, a sweep of the run a)]."""
    desks = {ahead: Desk(tmp_path / f"{ahead}" / "runs") for ahead in (-3600, -60, 0, 60, 3600)}
    return [(ahead, desk, desk.sweep(["a"])) for ahead, desk in desks.items()]


def test_what_is_cancelled_is_what_was_submitted_before_it(clocks):
    """Submitted on one login node and cancelled 5 s later on another; then submitted again, and cancelled again."""
    for ahead, desk, sweep in clocks:
        first = desk.submitted(sweep, [["a"]], jobs=["7"], ago=100)
        sweep.append("cancelled", runs=["a"], time=desk.now - 95 + ahead)
        assert seen(sweep, waiting(sweep, first))["a"] == ("cancelled", ""), ahead
        second = desk.submitted(sweep, [["a"]], jobs=["8"], ago=90 - ahead / 2, number=1)
        assert seen(sweep, waiting(sweep, second, "8"))["a"][0] == "pending", ahead
        sweep.append("cancelled", runs=["a"], time=desk.now - 85 + ahead)
        assert seen(sweep, waiting(sweep, second, "8"))["a"] == ("cancelled", ""), ahead


def test_the_last_submission_is_the_last_in_order(clocks):
    """Two sweeps, submitted one after another on hosts with other clocks; only the later one was cancelled."""
    for ahead, desk, sweep in clocks:
        other = desk.sweep(["a"], LATER)
        desk.submitted(sweep, [["a"]], jobs=["7"], ago=500)
        desk.submitted(other, [["a"]], jobs=["8"], ago=490 - ahead)
        assert standings(sweep, {})[0].job == "8", ahead
        sweep.append("cancelled", runs=["a"], time=desk.now - 400)  # not the later submission, of another sweep
        assert seen(sweep, {})["a"][0] == "lost", ahead
        other.append("cancelled", runs=["a"], time=desk.now - 400 - ahead)
        assert seen(sweep, {})["a"][0] == "cancelled", ahead


def test_a_run_that_failed_in_an_earlier_submission_is_not_submitted_a_third_time(clocks):
    for ahead, desk, sweep in clocks:
        earlier = desk.submitted(sweep, [["a"]], jobs=["6"], ago=1000)
        desk.run("a", "failed", ago=900 - ahead, submission=earlier)
        again = desk.submitted(sweep, [["a"]], jobs=["7"], ago=880, number=1)
        assert seen(sweep, waiting(sweep, again))["a"][0] == "pending", ahead
        desk.run("a", "failed", reason="OSError: disk", ago=800 - ahead, submission=again)
        assert seen(sweep, waiting(sweep, again, state="RUNNING"))["a"] == ("failed", "OSError: disk"), ahead


def test_sweeps_of_before_the_order_was_noted_go_by_time(desk, sweep):
    other = desk.sweep(["a"], LATER)
    for some, ago, job in ((other, 900, "7"), (sweep, 500, "8")):
        array = f"gsdg-{some.name}-0"
        some.append("submitted", time=desk.now - ago, cluster="slurm", array=array, packs=[["a"]])
        some.append("accepted", time=desk.now - ago, array=array, jobs=[job])
    assert standings(sweep, {})[0].job == "8"
    assert History(desk.runs_dir, {}).next_order == 1


# ---- cancelled ----------------------------------------------------------------------------------------------------


def test_a_run_cancelled_after_its_submission_is_cancelled_even_while_its_task_has_others(desk, sweep):
    array = desk.submitted(sweep, [["a", "b"]], jobs=["7"], ago=900)
    sweep.append("cancelled", runs=["a"], time=desk.now - 700)
    queue = waiting(sweep, array)
    assert (seen(sweep, queue)["a"], seen(sweep, queue)["b"][0]) == (("cancelled", ""), "pending")
    assert seen(sweep, {})["a"] == ("cancelled", "")
    assert seen(sweep, None)["a"] == ("cancelled", "")
    other = desk.sweep(["a"], LATER)
    again = desk.submitted(other, [["a"]], jobs=["8"], ago=500)
    assert seen(sweep, waiting(other, again, "8"))["a"][0] == "pending"


def test_a_cancelled_run_is_running_until_its_process_or_its_task_is_gone(desk, sweep):
    array = desk.submitted(sweep, [["a"]], jobs=["7"])
    desk.run("a", "running", ago=20, job="7", submission=array)
    sweep.append("cancelled", runs=["a"])
    assert seen(sweep, waiting(sweep, array, state="RUNNING"))["a"] == ("running", "cancelled: about to stop")
    assert seen(sweep, {})["a"] == ("cancelled", "")  # although its last heartbeat is recent
    assert seen(sweep, None)["a"][0] == "running"


def test_a_cancelled_run_at_work_outside_of_slurm_is_running(desk, sweep):
    """Run by hand after its task; then in a task of this machine."""
    desk.submitted(sweep, [["a"], ["b"]], jobs=["7_0", "7_1"])
    sweep.append("cancelled", runs=["a", "b", "c"])
    desk.run("a", "running", ago=20, submission=None)
    assert seen(sweep, {})["a"][0] == "running"
    assert seen(sweep, {})["c"][0] == "cancelled"  # no event says that it was submitted
    array = desk.submitted(sweep, [["b"]], jobs=["999999999"], cluster="local", number=1)
    sweep.append("cancelled", runs=["b"])
    desk.run("b", "running", ago=20, submission=array)
    assert seen(sweep, {})["b"][0] == "running"


# ---- without SLURM ------------------------------------------------------------------------------------------------


def test_a_task_on_this_machine_waits_while_its_process_lives(desk, sweep):
    process = desk.process("import time; print('ready'); time.sleep(600)", str(sweep.jobs))
    desk.submitted(sweep, [["a", "b"]], jobs=[str(process.pid)], cluster="local")
    assert seen(sweep, None)["b"] == ("pending", "waits for earlier runs of its task")
    process.kill()
    process.wait()
    assert seen(sweep, None)["b"] == ("lost", "submitted 8 min ago, its process is gone without a trace")
    unrelated = desk.process("import time; print('ready'); time.sleep(600)")
    desk.submitted(sweep, [["c"]], jobs=[str(unrelated.pid)], cluster="local", host=HERE, number=1)
    assert seen(sweep, None)["c"][0] == "lost"


def test_a_task_on_another_machine_lives_while_one_of_its_runs_beats(desk, sweep):
    desk.submitted(sweep, [["a", "b"]], jobs=["1"], cluster="local", host="elsewhere")
    for ago, state in ((10, "pending"), (500, "lost")):
        desk.run("a", "running", ago=ago)
        assert seen(sweep, None)["b"][0] == state


# ---- all of them --------------------------------------------------------------------------------------------------


def test_what_is_submitted_again():
    assert set(STATES) == TO_SUBMIT["all"] | {"running", "pending"}
    assert TO_SUBMIT["failed"] - TO_SUBMIT["missing"] == {"failed"}
    assert TO_SUBMIT["missing"] == {"missing", "lost", "stopped", "cancelled"}


def test_of_many_runs_every_file_is_read_once(desk, monkeypatch):
    """A read costs milliseconds on a network file system: one status per run with a folder, the events once."""
    names = [f"{number:012x}" for number in range(1000)]
    sweep = desk.sweep(names)
    array = desk.submitted(sweep, [[name] for name in names], jobs=[f"7_{index}" for index in range(len(names))])
    for index, name in enumerate(names[:900]):
        desk.run(name, ("done", "failed", "running")[index % 3], reason="OSError: disk", steps=100, submission=array)
    queue = {key: value for index in range(900, 990) for key, value in waiting(sweep, array, f"7_{index}").items()}
    runs, opened = sweep.runs(), []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) or read_bytes(path))
    found = Counter(run.state for run in run_states(runs, sweep.runs_dir, queue))
    assert found == {"done": 300, "failed": 300, "running": 300, "pending": 90, "lost": 10}
    assert Counter(path.name for path in opened) == {"status.json": 900, "events.jsonl": 1}


# ---- looking again ------------------------------------------------------------------------------------------------


def test_who_looks_again_and_again_reads_a_finished_run_once_until_it_is_replaced(desk, sweep, monkeypatch):
    from gsdg.sweep import run_states as module
    from gsdg.utils.json_files import read_json

    reads = []
    monkeypatch.setattr(module, "read_json", lambda path: reads.append(path.parent.name) or read_json(path))
    desk.run("a", "done", step=10)
    desk.run("b", "failed")
    read = module.CachedStatusReader()

    def look() -> dict[str, str]:
        reads.clear()
        return {run.run_id: run.state for run in run_states(sweep.runs(), sweep.runs_dir, {}, read)}

    assert look() == {"a": "done", "b": "failed", "c": "missing"}
    assert sorted(reads) == ["a", "b"]
    assert look() == {"a": "done", "b": "failed", "c": "missing"}
    assert reads == ["b"]
    # started again by force=true
    write_json(desk.runs_dir / "a" / "status.json", {"state": "failed", "heartbeat": desk.now})
    assert look() == {"a": "failed", "b": "failed", "c": "missing"}
    write_json(desk.runs_dir / "b" / "status.json", {"state": "done", "heartbeat": desk.now})
    look()
    assert look()["b"] == "done"
    assert reads == ["a"]


def test_status_watch_reads_finished_runs_once(desk, sweep, monkeypatch, capsys):
    """The command itself, which reads the states three times; the last run ends in between."""
    from gsdg.sweep import __main__ as commands
    from gsdg.sweep import run_states as module
    from gsdg.utils.json_files import read_json

    reads = Counter()
    monkeypatch.setattr(module, "read_json", lambda path: reads.update([path.parent.name]) or read_json(path))
    monkeypatch.setattr(commands, "queue", lambda runs_dir: {})
    desk.run("a", "done")
    desk.run("b", "done")
    desk.run("c", "running")
    ends = iter([lambda: None, lambda: desk.run("c", "done")])
    monkeypatch.setattr("gsdg.sweep.status_text.time.sleep", lambda seconds: next(ends)())
    assert commands.main(["status", "--watch", "--every", "0.01", "--runs-dir", str(desk.runs_dir)]) == 0
    assert "3 done" in capsys.readouterr().out
    assert (reads["a"], reads["b"]) == (1, 1)
    assert reads["c"] == 3
