"""Where the reason and the traceback of a failed run are written, and that `status` finds them."""

from __future__ import annotations

import pytest
from desk import Desk
from hydra.utils import get_object

from gsdg.runs.folder import RunFolder
from gsdg.runs.run_log import reason_of
from gsdg.sweep import failure, status_text
from gsdg.sweep.run_states import run_states
from gsdg.utils.errors import UserError


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path / "my runs")
    yield desk
    desk.clear()


def failed(call) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any
        call()
    return caught.value


def test_a_reason_is_the_first_line_and_of_an_import_error_the_cause_too():
    assert reason_of(UserError("x=1: wrong.\nValid: 2.")) == "UserError: x=1: wrong."
    assert reason_of(ValueError()) == "ValueError: "
    reason = reason_of(failed(lambda: get_object("b_no_such_module.Net")))
    assert reason.startswith("ImportError: Error loading 'b_no_such_module.Net': ")
    assert "No module named 'b_no_such_module'" in reason
    assert "\n" not in reason


def test_a_failure_before_the_run_has_its_folder_is_in_status_and_log(desk):
    sweep = desk.sweep(["a"])
    array = desk.submitted(sweep, [["a"]], jobs=["1"])
    folder = RunFolder(desk.runs_dir / "a")
    assert not failure.is_recorded(folder, sweep.path, array)
    failure.record(folder, sweep.path, array, "ImportError: x", "Traceback: all of it\n")
    assert failure.is_recorded(folder, sweep.path, array)
    assert not failure.is_recorded(folder, sweep.path, "another submission")
    (run,) = run_states(sweep.runs(), desk.runs_dir, {})
    assert (run.state, run.reason) == ("failed", "ImportError: x")
    assert "Traceback: all of it" in (folder.path / "log.txt").read_text()
    assert status_text.traceback_file(sweep, [run]) == folder.path / "log.txt"


def test_where_the_folder_cannot_be_written_the_sweep_has_the_reason_until_it_is_submitted_again(desk):
    sweep = desk.sweep(["a", "b"])
    array = desk.submitted(sweep, [["a", "b"]], jobs=["1"])
    (desk.runs_dir / "a").write_text("a file in the place of a folder")
    folder = RunFolder(desk.runs_dir / "a")
    failure.record(folder, sweep.path, array, "PermissionError: no")
    assert failure.is_recorded(folder, sweep.path, array)
    a, b = run_states(sweep.runs(), desk.runs_dir, {})
    assert (a.state, a.reason, b.state) == ("failed", "PermissionError: no", "lost")
    desk.submitted(sweep, [["a"]], jobs=["2"], ago=1.0, number=1)
    assert run_states(sweep.runs(), desk.runs_dir, {})[0].state == "lost"


def test_a_run_that_another_process_holds_is_left_to_it(desk):
    sweep = desk.sweep(["a"])
    desk.working("a")
    failure.record(RunFolder(desk.runs_dir / "a"), sweep.path, "array", "ValueError: x")
    assert RunFolder(desk.runs_dir / "a").status["state"] == "running"


def test_status_names_the_file_that_has_the_traceback_in_commands_that_work_when_pasted(desk):
    sweep = desk.sweep(["a"])
    array = desk.submitted(sweep, [["a"]], jobs=["1"])
    desk.run("a", "failed", submission=array, reason="ValueError: too large", job="1")
    runs = run_states(sweep.runs(), desk.runs_dir, {})
    assert not any(line.startswith("why") for line in status_text.next_steps(sweep, runs)), "there is no file"
    sweep.jobs.mkdir(exist_ok=True)
    sweep.log_of("1").write_text("Traceback\nValueError: too large\n")
    assert f"why: {sweep.log_of('1')}" in status_text.next_steps(sweep, runs)
    (desk.runs_dir / "a" / "log.txt").write_text("of an earlier start\n")
    assert f"why: {sweep.log_of('1')}" in status_text.next_steps(sweep, runs), "log.txt does not have it"
    (desk.runs_dir / "a" / "log.txt").write_text("Traceback\nValueError: too large\n")
    why, again = status_text.next_steps(sweep, runs)
    assert why == f"why: {desk.runs_dir / 'a' / 'log.txt'}"
    assert again.endswith(f"python -m gsdg.sweep retry {sweep.name} --runs-dir '{desk.runs_dir}'")
