"""`python -m gsdg.sweep`, with sweeps made by hand; against a real SLURM it is tried in tests/slurm."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from desk import FIRST, Desk, config
from helpers import REPOSITORY

from gsdg.errors import UserError
from gsdg.sweep import __main__ as commands
from gsdg.sweep import slurm
from gsdg.sweep.folder import Frozen
from gsdg.sweep.slurm import Queued

LATER = "2026-02-02_10-00-00-222222"


class Cluster:
    """What SLURM would answer, and what it was told. queue: None, it does not answer."""

    def __init__(self) -> None:
        self.queue: dict | None = {}
        self.withdrawn: list[str] = []

    def answer(self, owners: set[int] = frozenset()) -> dict:
        if self.queue is None:
            raise UserError("squeue: no answer within 10 s")
        return self.queue

    def hold(self, array: str, *jobs: str, state: str = "PENDING") -> None:
        self.queue |= {
            (array, i): Queued(job=job, state=state, reason="Priority", node="") for i, job in enumerate(jobs)
        }


@pytest.fixture
def cluster(monkeypatch):
    cluster = Cluster()
    monkeypatch.setattr(slurm, "queue", cluster.answer)
    monkeypatch.setattr(slurm, "cancel", cluster.withdrawn.extend)
    return cluster


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path / "runs")
    yield desk
    desk.clear()


@pytest.fixture
def sweep(desk):
    """Two runs on sketch, two on photo."""
    targets = {"a": "sketch", "b": "sketch", "c": "photo", "d": "photo"}
    return desk.sweep([Frozen(name, [f"split.target={value}"], config(value)) for name, value in targets.items()])


@pytest.fixture
def command(desk, cluster, capsys):
    """(exit status, stdout, stderr) of a command."""

    def command(*words: str) -> tuple[int, str, str]:
        where = [] if words[0] in ("plan", "prepare") else [f"--runs-dir={desk.runs_dir}"]
        code = commands.main([*words, *where])
        return code, *capsys.readouterr()

    return command


def events(sweep) -> list[list[str]]:
    return [event["runs"] for event in sweep.events() if event["event"] == "cancelled"]


# ---- status -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "code"), [("done", 0), ("failed", 1), ("running", 3)])
def test_status_tells_by_its_exit_status_how_it_stands(desk, sweep, command, state, code):
    for name in "abcd":
        desk.run(name, "done")
    desk.run("a", state)
    found, output, _ = command("status")
    assert found == code
    assert "4 runs" in output


def test_status_of_a_part_of_a_sweep(desk, sweep, command):
    desk.run("c", "done")
    desk.run("d", "done")
    code, output, _ = command("status", "2026-01", "split.target=photo")
    assert (code, output.splitlines()[1]) == (0, "2 done")
    desk.sweep(["x"], LATER)
    assert command("status")[1].startswith(f"sweep {LATER}")
    assert command("status", FIRST)[1].startswith(f"sweep {FIRST}")


def test_status_without_an_answer_of_slurm_shows_the_disk(desk, sweep, command, cluster):
    cluster.queue = None
    desk.submitted(sweep, [["a"]], jobs=["7"])
    desk.run("b", "done")
    code, output, _ = command("status")
    assert code == 3
    assert "1 done | 1 pending | 2 missing" in output
    assert "SLURM does not answer" in output


def test_status_all_lists_every_run(sweep, command):
    rows = {line.split()[0] for line in command("status", "--all")[1].splitlines() if line.startswith("  ")}
    assert rows >= set("abcd")


def test_watching_ends_with_the_sweep_and_then_shows_it_whole(desk, sweep, command):
    for name in "abcd":
        desk.run(name, "done")
    code, output, _ = command("status", "--watch", "0.01")
    assert code == 0
    assert output.count("4 done") == 2
    assert "the table:" in output


def test_ctrl_c_ends_watching_with_the_whole_picture(desk, sweep, command, monkeypatch):
    desk.run("a", "running")

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gsdg.sweep.table.time.sleep", interrupted)
    code, output, _ = command("status", "--watch")
    assert code == 3
    assert "heartbeat" in output


# ---- cancel -------------------------------------------------------------------------------------------------------


def test_cancel_notes_it_and_takes_the_tasks_out_of_the_queue(desk, sweep, command, cluster, monkeypatch):
    cluster.hold(desk.submitted(sweep, [["a"], ["b"], ["c"]], jobs=["7_0", "7_1", "7_2"]), "7_0", "7_1", "7_2")
    desk.run("d", "done")
    noted_first = []
    monkeypatch.setattr(slurm, "cancel", lambda jobs: noted_first.append((events(sweep), jobs)))
    code, output, _ = command("cancel")
    assert code == 0
    assert noted_first == [([["a", "b", "c"]], ["7_0", "7_1", "7_2"])]
    assert "3 of 4 runs cancelled (3 pending)" in output
    assert "3 tasks taken from SLURM" in output


def test_cancel_takes_only_what_the_filter_says(desk, sweep, command, cluster):
    array = desk.submitted(sweep, [["a"], ["b"], ["c"], ["d"]], jobs=["7_0", "7_1", "7_2", "7_3"])
    cluster.hold(array, "7_0", "7_1", "7_2", "7_3")
    command("cancel", "split.target=photo")
    assert (events(sweep), cluster.withdrawn) == ([["c", "d"]], ["7_2", "7_3"])


def test_a_task_with_other_unfinished_runs_goes_on(desk, sweep, command, cluster):
    array = desk.submitted(sweep, [["a", "c"], ["b", "d"]], jobs=["7_0", "7_1"])
    cluster.hold(array, "7_0", "7_1", state="RUNNING")
    desk.run("b", "done")
    _, output, _ = command("cancel", "split.target=photo")
    assert cluster.withdrawn == ["7_1"]  # b is done: with d, nothing is left to do
    assert "1 task left" in output
    command("cancel", "split.target=sketch")
    assert cluster.withdrawn == ["7_1", "7_0"]


def test_a_task_of_several_runs_is_withdrawn_once(desk, sweep, command, cluster):
    cluster.hold(desk.submitted(sweep, [["a", "b", "c", "d"]], jobs=["7"]), "7")
    assert "1 task taken" in command("cancel")[1]
    assert cluster.withdrawn == ["7"]


def test_a_running_neighbour_keeps_its_task(desk, sweep, command, cluster):
    cluster.hold(desk.submitted(sweep, [["a", "c"]], jobs=["7_0"]), "7_0", state="RUNNING")
    desk.run("a", "running")
    command("cancel", "split.target=photo")
    assert (events(sweep), cluster.withdrawn) == ([["c"]], [])


def test_a_running_run_is_cancelled_with_its_task(desk, sweep, command, cluster):
    cluster.hold(desk.submitted(sweep, [["a"]], jobs=["7"]), "7", state="RUNNING")
    desk.run("a", "running")
    assert "1 of 4 runs cancelled (1 running)" in command("cancel")[1]
    assert (events(sweep), cluster.withdrawn) == ([["a"]], ["7"])


def test_runs_that_another_sweep_queued_are_cancelled_where_they_are(desk, sweep, command, cluster):
    later = desk.sweep([Frozen("a", [], config()), Frozen("x", [], config())], LATER)
    cluster.hold(desk.submitted(sweep, [["a"]], jobs=["7"]), "7")
    cluster.hold(desk.submitted(later, [["x"]], jobs=["8"]), "8")
    command("cancel")  # the later one
    assert sorted(cluster.withdrawn) == ["7", "8"]
    assert "a" in events(sweep)[0]
    assert "x" in events(later)[0]


def test_while_slurm_is_silent_it_is_noted_and_a_second_time_empties_the_queue(desk, sweep, command, cluster):
    array = desk.submitted(sweep, [["a"]], jobs=["7"])
    cluster.queue = None
    assert "Cancel again" in command("cancel")[1]
    assert (events(sweep), cluster.withdrawn) == ([["a"]], [])
    cluster.queue = {}
    cluster.hold(array, "7")
    command("cancel")
    assert (events(sweep), cluster.withdrawn) == ([["a"]], ["7"])


def test_what_no_sweep_submitted_is_left_alone(desk, sweep, command):
    desk.working("a")
    code, output, _ = command("cancel")
    assert (code, events(sweep)) == (0, [])
    assert "0 of 4 runs cancelled\n" in output
    assert "left alone: run a" in output


def test_what_is_run_by_hand_after_its_task_is_left_alone(desk, sweep, command, cluster):
    desk.submitted(sweep, [["a"]], jobs=["7"])
    desk.working("a")
    assert "left alone: run a" in command("cancel")[1]
    assert events(sweep) == []


def test_a_task_without_slurm_is_told_by_the_sweeps_events(desk, sweep, command, cluster):
    process = desk.process("import time; print('ready'); time.sleep(600)", str(sweep.jobs))
    desk.submitted(sweep, [["a", "b", "c", "d"]], jobs=[str(process.pid)], cluster="local")
    assert "1 task left" in command("cancel")[1]
    assert (sorted(events(sweep)[0]), cluster.withdrawn) == (["a", "b", "c", "d"], [])


# ---- retry, prepare -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "resubmit"), [([], "failed"), (["--resubmit", "missing"], "missing")])
def test_retry_hands_the_chosen_runs_on(sweep, command, monkeypatch, words, resubmit):
    submit = pytest.importorskip("gsdg.sweep.submit")
    asked = []
    monkeypatch.setattr(submit, "resubmit", lambda sweep, runs, how: asked.append((sweep.name, runs, how)))
    assert command("retry", FIRST, "split.target=photo", *words)[0] == 0
    ((name, runs, how),) = asked
    assert (name, [run.run_id for run in runs], how) == (FIRST, ["c", "d"], resubmit)


def test_prepare_hands_on_every_runs_config(command, monkeypatch, tmp_path):
    prepare = pytest.importorskip("gsdg.sweep.prepare")
    asked = []
    monkeypatch.setattr(prepare, "prepare", asked.extend)
    assert command("prepare", "-m", "split.target=0,15", f"runs_dir={tmp_path}", "algorithm=erm")[0] == 0
    assert [one["split"]["target"] for one in asked] == [["0"], ["15"]]


# ---- plan ---------------------------------------------------------------------------------------------------------

SWEEP = ["split.target=0,15", "split.trial_seed=0,1", "algorithm=erm", "hydra/launcher=slurm", "trainer.eval_every=50"]


def test_a_plan_knows_what_is_done_and_what_the_rest_costs(command, tmp_path):
    from gsdg.sweep.freeze import frozen
    from gsdg.sweep.grid import from_command_line

    overrides = [*SWEEP, f"runs_dir={tmp_path / 'runs'}", "hydra.launcher.runs_per_task=2"]
    composer, jobs, _ = from_command_line(overrides)
    first, second, *_ = frozen(composer, jobs)
    folder = Desk(tmp_path / "runs").run(first.run_id, "done")
    (folder / "config.json").write_text(json.dumps(first.config))
    times = {"step": 7.2, "evaluation": 0.0}
    (folder / "records.jsonl").write_text(json.dumps({"step": 50, "seconds": times}))
    Desk(tmp_path / "runs").run(second.run_id, "failed", step=first.config["trainer"]["steps"] - 500)
    code, output, _ = command("plan", *overrides)
    assert code == 0
    lines = output.splitlines()
    assert lines[0] == "4 runs: 1 done, 3 to submit (resubmit=failed: 1 failed, 2 missing)"
    assert lines[1] == "in 2 tasks, 2 at once"
    steps = 2 * first.config["trainer"]["steps"] + 500
    assert lines[2].startswith(f"about {steps * 7.2 / 3600:.3g} GPU hours, ")
    assert "from 1 measured run (the same method: 3 runs)" in lines[3]
    assert "3 to submit (resubmit=missing" not in command("plan", *overrides, "resubmit=missing")[1]
    assert "4 to submit (resubmit=all" in command("plan", *overrides, "force=true")[1]


def test_a_plan_writes_nothing(command, tmp_path):
    command("plan", *SWEEP, f"runs_dir={tmp_path / 'runs'}", "--all")
    assert list(tmp_path.iterdir()) == []


# ---- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["status", "nix"], "no sweep is called nix"),
        (["status", "one", "two"], "several sweeps are named: one, two"),
        (["cancel", "split.target=nix"], "no run of 4 has split.target=nix"),
        (["plan", "algorithm=nix"], "algorithm/nix"),
        (["plan", "algorithm=erm", "split.target=nix"], "nix"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_a_message_and_exit_status_2(sweep, command, words, said):
    code, _, errors = command(*words)
    assert code == 2
    assert errors.startswith("error: ")
    assert said in errors


def test_an_unknown_option_is_refused(sweep, command):
    with pytest.raises(SystemExit):
        command("status", "--al", "--nix")


def test_words_may_follow_options():
    chosen = commands.options(["status", "--runs-dir", "/x", "name", "--all", "a=1"])
    assert (sorted(chosen.words), chosen.all) == (["a=1", "name"], True)


def test_it_runs_as_a_module(sweep, desk):
    command = [sys.executable, "-m", "gsdg.sweep", "status", f"--runs-dir={desk.runs_dir}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "4 missing" in done.stdout
