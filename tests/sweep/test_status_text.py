"""The texts of `status` and `plan`: every run is counted, and long lists are shortened."""

from __future__ import annotations

import io
import json
import re

import pytest
from desk import config

from gsdg.sweep import status_text
from gsdg.sweep.estimate import Estimate
from gsdg.sweep.run_states import RunState, format_duration


def run(run_id: str, state: str, *overrides: str, **more: object) -> RunState:
    facts = {"step": 0, "steps": 100, "age": None, "reason": "", "job": None, "host": None, "config": config()}
    return RunState(run_id=run_id, state=state, overrides=list(overrides), **{**facts, **more})


@pytest.fixture
def sweep(desk):
    return desk.sweep(["a"])


MIXED = [
    run("a1", "done", "split.target=photo", "seed=1", "x=7"),
    run("b2", "running", "split.target=photo", "seed=2", "x=7", step=40, age=4.0, job="7_1", host="n3"),
    run("c3", "pending", "split.target=sketch", "seed=1", "x=7", reason="PENDING (Priority)"),
    run("d4", "failed", "split.target=sketch", "seed=2", "x=7", reason="OSError: disk"),
    run("e5", "failed", "split.target=cartoon", "seed=1", "x=7", reason="ValueError: x"),
    run("f6", "failed", "split.target=cartoon", "seed=2", "x=7", reason="OSError: disk"),
    run("07", "lost", "split.target=art", "seed=1", "x=7", reason="killed by SLURM: out of memory"),
    run("08", "pending", "split.target=art", "seed=2", "x=7", reason="PENDING (Priority)"),
]


def runs_in(states: list[str]) -> list[RunState]:
    return [run(str(number), state) for number, state in enumerate(states)]


def line_with(text: str, *words: str) -> str:
    (found,) = [line for line in text.splitlines() if all(word in line for word in words)]
    return found


def test_the_counts_of_all_runs_come_first_and_a_running_run_shows_what_is_swept_and_how_far_it_is(sweep):
    text = status_text.status(sweep, MIXED)
    first, second, *_ = text.splitlines()
    assert first == f"sweep {sweep.name}, submitted 0 s ago: 8 runs"
    assert second == "1 done | 1 running | 2 pending | 3 failed | 1 lost"
    head = line_with(text, "heartbeat")
    assert head.split() == ["run", "target", "seed", "step", "heartbeat", "host", "job"]
    assert line_with(text, "b2").split() == ["b2", "photo", "2", "40/100", "4", "s", "ago", "n3", "7_1"]
    assert head.index("step") == line_with(text, "b2").index("40/100")
    every = status_text.status(sweep, MIXED, every=True)
    assert line_with(every, "c3").split() == ["c3", "sketch", "1", "0/100", "pending", "PENDING", "(Priority)"]
    assert line_with(every, "a1").endswith("done")


def test_reasons_are_grouped_with_their_count_and_one_folder(sweep):
    text = status_text.status(sweep, MIXED)
    assert line_with(text, "OSError").split() == ["2", "OSError:", "disk", str(sweep.runs_dir / "d4")]
    assert line_with(text, "ValueError").split()[0] == "1"
    assert text.index("OSError") < text.index("ValueError")
    assert str(sweep.runs_dir / "07") in line_with(text, "out of memory")
    assert line_with(text, "Priority").split() == ["2", "PENDING", "(Priority)"]


def test_a_few_hundred_runs_fit_a_screen(sweep):
    many = [run(f"r{i:03}", "running", f"seed={i}", age=1.0) for i in range(100)]
    many += [run(f"f{i:03}", "failed", f"seed={i}", reason=f"E{i}") for i in range(100)]
    text = status_text.status(sweep, many)
    assert len(text.splitlines()) < 60
    assert "and 80 more (--all lists them)" in text
    assert "and 80 more reasons" in text
    every = status_text.status(sweep, many, every=True)
    assert all(each.run_id in every for each in many)
    most = status_text.MAX_ROWS
    text = status_text.status(sweep, [*many[:most], *many[100 : 100 + most]])
    assert "more" not in text, "lists of MAX_ROWS rows are complete"


def test_a_key_has_its_last_word_if_that_is_unique_and_varies_also_if_some_runs_lack_it():
    keys = ["split.seed", "data.seed", "algorithm.alpha"]
    assert [status_text.short_key(key, keys) for key in keys] == ["split.seed", "data.seed", "alpha"]
    runs = [run("a", "done", "+x=1", "algorithm=erm"), *(run(name, "done", "algorithm=erm") for name in "bc")]
    assert status_text.varying_keys(runs) == ["x"]


def test_the_next_command_is_named(sweep):
    for states, command in (
        (["done"], "python -m analysis"),
        (["done", "failed", "lost"], f"retry {sweep.name} --runs-dir {sweep.runs_dir}"),
        (["done", "lost"], f"retry {sweep.name} --runs-dir {sweep.runs_dir} --resubmit missing"),
        (["missing"], "--resubmit missing"),
    ):
        text = status_text.status(sweep, runs_in(states))
        assert command in text, states
        assert ("--resubmit" in text) == ("--resubmit" in command), states


def test_a_slurm_that_does_not_answer_is_noted(sweep):
    silent = [run("a", "pending", reason="SLURM does not answer")]
    assert "squeue" in status_text.status(sweep, silent)
    assert "squeue" not in status_text.status(sweep, MIXED)


def test_the_time_left_is_of_what_runs_and_waits_at_the_pace_of_the_sweep(desk, sweep):
    folder = desk.run("a1", "done")
    seconds = {"step": 36.0, "evaluation": 0.0}
    (folder / "records.jsonl").write_text(json.dumps({"step": 50, "seconds": seconds}))
    found = [run("a1", "done", step=100), *(run(name, "running", step=50) for name in "bc"), run("d", "pending")]
    line = line_with(status_text.status(sweep, found), "left")
    assert line.startswith("about 90 min left with 2 at once, from 1 measured run (the same method: 3 runs)")
    assert "not known" in line_with(status_text.status(sweep, found[1:]), "left")
    assert "left" not in status_text.status(sweep, [found[0], found[-1]])


def test_the_exit_status_tells_done_from_wrong_from_not_yet():
    wrong = (["done", "failed"], ["done", "lost"], ["missing"], ["cancelled", "done"], ["stopped"])
    expected = {0: [["done", "done"]], 1: wrong, 3: [["running", "done"], ["failed", "pending"]]}
    for code, cases in expected.items():
        for states in cases:
            assert status_text.exit_status(runs_in(states)) == code, states


def test_a_plan_says_what_is_done_what_is_due_and_what_it_costs():
    runs = [run("a", "done"), run("b", "running"), run("c", "missing"), run("d", "missing"), run("e", "failed")]
    cost = Estimate([3600.0, 3600.0, None], {"the same method": 2}, ["a"], ["H100"])
    text = status_text.plan(runs, runs[2:], "failed", 2, cost, 64, "GPU")
    assert text == (
        "5 runs: 1 done, 1 running, 3 to submit (resubmit=failed: 1 failed, 2 missing)\n"
        "in 2 tasks, 64 at once\n"
        "about 2 GPU hours, 60 min with 64 at once,\n"
        "from 1 measured run (the same method: 2 runs; on H100), no measured run like these: 1 run"
    )


def test_a_plan_leaves_out_what_this_launch_would_leave():
    runs, nothing = [run("a", "done"), run("e", "failed")], Estimate([], {}, [], [])
    text = status_text.plan(runs, [], "missing", 0, nothing, 0, "GPU")
    assert text == "2 runs: 1 done, 1 failed, 0 to submit (resubmit=missing)"
    text = status_text.plan(runs, runs, "all", 2, Estimate([None, None], {}, [], []), 2, "GPU")
    assert text.splitlines()[0] == "2 runs: 2 to submit (resubmit=all: 1 done, 1 failed)"


def test_a_duration_is_short():
    seconds = (0, 45.4, 99, 120, 5900, 6600, 400000)
    assert [*map(format_duration, seconds)] == ["0 s", "45 s", "99 s", "2 min", "98 min", "1.8 h", "4.6 days"]


# ---- --watch ------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def looks(*pictures: list[RunState]):
    left = list(pictures)
    return lambda: left.pop(0)


RUNNING, DONE = [run("a", "running"), run("b", "pending")], [run("a", "done"), run("b", "done")]


def test_a_terminal_is_drawn_anew_until_all_is_done():
    out = Terminal()
    drawn = []
    last = status_text.watch(looks(RUNNING, RUNNING, DONE), lambda found: drawn.append(found) or "picture", 0.0, out)
    assert (drawn, last) == ([RUNNING, RUNNING, DONE], DONE)
    assert out.getvalue() == "\x1b[H\x1b[2Jpicture\n" * 3


def test_a_file_gets_a_line_only_when_the_counts_change():
    out = io.StringIO()
    status_text.watch(looks(RUNNING, RUNNING, RUNNING, DONE), lambda found: "picture", 0.0, out)
    assert [re.sub(r"^[\d:]{8} ", "", line) for line in out.getvalue().splitlines()] == [
        " 1 running | 1 pending",
        " 2 done",
    ]


def test_watching_goes_on_while_slurm_is_silent():
    unsure = [run("a", "stopped", reason="SIGUSR2 (SLURM does not answer)"), run("b", "done")]
    assert status_text.watch(looks(unsure, DONE), lambda found: "", 0.0, io.StringIO()) == DONE


def test_a_picture_never_scrolls_its_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setenv("LINES", "4")
    assert status_text.clip_to_terminal("\n".join(["x" * 30] * 9)) == "\n".join(["x" * 10] * 3)
