"""What a user reads of a sweep: nothing is left out of the counts, and nothing drowns the rest."""

from __future__ import annotations

import io
import json
import re

import pytest
from desk import Desk, config

from gsdg.sweep import table
from gsdg.sweep.estimate import Estimate
from gsdg.sweep.states import Standing, span


def one(run_id: str, state: str, *overrides: str, **more: object) -> Standing:
    facts = {"step": 0, "steps": 100, "age": None, "reason": "", "job": None, "host": None, "config": config()}
    return Standing(run_id=run_id, state=state, overrides=list(overrides), **{**facts, **more})


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path / "runs")


@pytest.fixture
def sweep(desk):
    return desk.sweep(["a"])


MIXED = [
    one("a1", "done", "split.target=photo", "seed=1", "x=7"),
    one("b2", "running", "split.target=photo", "seed=2", "x=7", step=40, age=4.0, job="7_1", host="n3"),
    one("c3", "pending", "split.target=sketch", "seed=1", "x=7", reason="PENDING (Priority)"),
    one("d4", "failed", "split.target=sketch", "seed=2", "x=7", reason="OSError: disk"),
    one("e5", "failed", "split.target=cartoon", "seed=1", "x=7", reason="ValueError: x"),
    one("f6", "failed", "split.target=cartoon", "seed=2", "x=7", reason="OSError: disk"),
    one("07", "lost", "split.target=art", "seed=1", "x=7", reason="killed by SLURM: out of memory"),
    one("08", "pending", "split.target=art", "seed=2", "x=7", reason="PENDING (Priority)"),
]


def line_with(text: str, *words: str) -> str:
    (found,) = [line for line in text.splitlines() if all(word in line for word in words)]
    return found


def test_the_counts_come_first_and_are_those_of_all_runs(sweep):
    first, second, *_ = table.status(sweep, MIXED).splitlines()
    assert first == f"sweep {sweep.name}, submitted 0 s ago: 8 runs"
    assert second == "1 done | 1 running | 2 pending | 3 failed | 1 lost"


def test_a_running_run_shows_what_is_swept_and_how_far_it_is(sweep):
    text = table.status(sweep, MIXED)
    head = line_with(text, "heartbeat")
    assert head.split() == ["run", "target", "seed", "step", "heartbeat", "host", "job"]
    assert line_with(text, "b2").split() == ["b2", "photo", "2", "40/100", "4", "s", "ago", "n3", "7_1"]
    assert head.index("step") == line_with(text, "b2").index("40/100")


def test_reasons_are_grouped_with_their_count_and_one_folder(sweep):
    text = table.status(sweep, MIXED)
    assert line_with(text, "OSError").split() == ["2", "OSError:", "disk", str(sweep.runs_dir / "d4")]
    assert line_with(text, "ValueError").split()[0] == "1"
    assert text.index("OSError") < text.index("ValueError")
    assert str(sweep.runs_dir / "07") in line_with(text, "out of memory")
    assert line_with(text, "Priority").split() == ["2", "PENDING", "(Priority)"]


def test_a_few_hundred_runs_fit_a_screen(sweep):
    many = [one(f"r{i:03}", "running", f"seed={i}", age=1.0) for i in range(100)]
    many += [one(f"f{i:03}", "failed", f"seed={i}", reason=f"E{i}") for i in range(100)]
    text = table.status(sweep, many)
    assert len(text.splitlines()) < 60
    assert "and 80 more (--all lists them)" in text
    assert "and 80 more reasons" in text
    every = table.status(sweep, many, every=True)
    assert all(one.run_id in every for one in many)


def test_every_run_is_listed_with_state_and_reason(sweep):
    text = table.status(sweep, MIXED, every=True)
    assert line_with(text, "c3").split() == ["c3", "sketch", "1", "0/100", "pending", "PENDING", "(Priority)"]
    assert line_with(text, "a1").endswith("done")


def test_words_that_are_not_unique_are_not_shortened():
    keys = ["split.seed", "data.seed", "algorithm.alpha"]
    assert [table.short(key, keys) for key in keys] == ["split.seed", "data.seed", "alpha"]


def test_a_key_varies_if_some_runs_lack_it():
    runs = [
        one("a", "done", "+x=1", "algorithm=erm"),
        one("b", "done", "algorithm=erm"),
        one("c", "done", "algorithm=erm"),
    ]
    assert table.varying(runs) == ["x"]


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (["done"], "python -m analysis"),
        (["done", "failed", "lost"], "retry {name} --runs-dir {runs}"),
        (["done", "lost"], "retry {name} --runs-dir {runs} --resubmit missing"),
        (["missing"], "--resubmit missing"),
    ],
    ids=str,
)
def test_the_next_command_is_named(sweep, states, said):
    text = table.status(sweep, [one(str(i), state) for i, state in enumerate(states)])
    assert said.format(name=sweep.name, runs=sweep.runs_dir) in text
    assert ("--resubmit" in text) == ("--resubmit" in said)


def test_a_silent_slurm_is_said(sweep):
    silent = [one("a", "pending", reason="SLURM does not answer")]
    assert "squeue" in table.status(sweep, silent)
    assert "squeue" not in table.status(sweep, MIXED)


def test_the_time_left_is_of_what_runs_and_waits_at_the_pace_of_the_sweep(desk, sweep):
    folder = desk.run("a1", "done")
    seconds = {"step": 36.0, "evaluation": 0.0}
    (folder / "records.jsonl").write_text(json.dumps({"step": 50, "seconds": seconds}))
    found = [one("a1", "done", step=100), *(one(name, "running", step=50) for name in "bc"), one("d", "pending")]
    line = line_with(table.status(sweep, found), "left")
    assert line.startswith("about 90 min left with 2 at once, from 1 measured run (the same method: 3 runs)")
    assert "not known" in line_with(table.status(sweep, found[1:]), "left")
    assert "left" not in table.status(sweep, [found[0], found[-1]])


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["done", "done"], 0),
        (["done", "failed"], 1),
        (["done", "lost"], 1),
        (["missing"], 1),
        (["cancelled", "done"], 1),
        (["stopped"], 1),
        (["running", "done"], 3),
        (["failed", "pending"], 3),
    ],
)
def test_the_exit_status_tells_done_from_wrong_from_not_yet(states, expected):
    assert table.exit_status([one(str(i), state) for i, state in enumerate(states)]) == expected


def test_a_plan_says_what_is_done_what_is_due_and_what_it_costs():
    runs = [one("a", "done"), one("b", "running"), one("c", "missing"), one("d", "missing"), one("e", "failed")]
    cost = Estimate([3600.0, 3600.0, None], {"the same method": 2}, ["a"], ["H100"])
    text = table.plan(runs, runs[2:], "failed", 2, cost, 64, "GPU")
    assert text == (
        "5 runs: 1 done, 1 running, 3 to submit (resubmit=failed: 1 failed, 2 missing)\n"
        "in 2 tasks, 64 at once\n"
        "about 2 GPU hours, 60 min with 64 at once,\n"
        "from 1 measured run (the same method: 2 runs; on H100), no measured run like these: 1 run"
    )


def test_a_plan_leaves_out_what_this_launch_would_leave():
    runs = [one("a", "done"), one("e", "failed")]
    nothing = Estimate([], {}, [], [])
    assert table.plan(runs, [], "missing", 0, nothing, 0, "GPU") == (
        "2 runs: 1 done, 1 failed, 0 to submit (resubmit=missing)"
    )
    again = Estimate([None, None], {}, [], [])
    assert table.plan(runs, runs, "all", 2, again, 2, "GPU").splitlines()[0] == (
        "2 runs: 2 to submit (resubmit=all: 1 done, 1 failed)"
    )


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (45.4, "45 s"), (99, "99 s"), (120, "2 min"), (5900, "98 min"), (6600, "1.8 h"), (400000, "4.6 days")],
)
def test_a_length_of_time_is_short(seconds, said):
    assert span(seconds) == said


# ---- --watch ------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def looks(*pictures: list[Standing]):
    left = list(pictures)
    return lambda: left.pop(0)


RUNNING, DONE = [one("a", "running"), one("b", "pending")], [one("a", "done"), one("b", "done")]


def test_a_terminal_is_drawn_anew_until_all_is_done():
    out = Terminal()
    drawn = []
    last = table.watch(looks(RUNNING, RUNNING, DONE), lambda found: drawn.append(found) or "picture", 0.0, out)
    assert (drawn, last) == ([RUNNING, RUNNING, DONE], DONE)
    assert out.getvalue() == "\x1b[H\x1b[2Jpicture\n" * 3


def test_a_file_gets_a_line_only_when_the_counts_change():
    out = io.StringIO()
    table.watch(looks(RUNNING, RUNNING, RUNNING, DONE), lambda found: "picture", 0.0, out)
    assert [re.sub(r"^[\d:]{8} ", "", line) for line in out.getvalue().splitlines()] == [
        " 1 running | 1 pending",
        " 2 done",
    ]


def test_watching_goes_on_while_slurm_is_silent():
    unsure = [one("a", "stopped", reason="SIGUSR2 (SLURM does not answer)"), one("b", "done")]
    assert table.watch(looks(unsure, DONE), lambda found: "", 0.0, io.StringIO()) == DONE


def test_a_picture_never_scrolls_its_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setenv("LINES", "4")
    assert table.clipped("\n".join(["x" * 30] * 9)) == "\n".join(["x" * 10] * 3)
