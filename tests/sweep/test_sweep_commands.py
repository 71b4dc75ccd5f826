"""`python -m gsdg.sweep`, with sweeps made by hand; tests/slurm runs it against a real SLURM."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from desk import FIRST, Desk, config
from helpers import REPOSITORY

from gsdg.sweep import __main__ as commands
from gsdg.sweep import slurm
from gsdg.sweep.folder import FrozenRun
from gsdg.sweep.slurm import QueuedTask
from gsdg.utils.errors import UserError

LATER = "2026-02-02_10-00-00-222222"


class Cluster:
    """SLURM's queue, and the jobs that were cancelled. queue: None if SLURM does not answer."""

    def __init__(self) -> None:
        self.queue: dict | None = {}
        self.withdrawn: list[str] = []

    def answer(self, owners: set[int] = frozenset()) -> dict:
        if self.queue is None:
            raise UserError("squeue: no answer within 10 s")
        return self.queue

    def hold(self, array: str, *jobs: str, state: str = "PENDING") -> None:
        name = array.removeprefix("gsdg-").rpartition("-")[0]
        script = f"/home/runs/.sweeps/{name}/jobs/.submission_file_{array}.sh"
        self.queue |= {job: QueuedTask(job, state, "Priority", "", script) for job in jobs}


@pytest.fixture
def cluster(monkeypatch):
    cluster = Cluster()
    monkeypatch.setattr(slurm, "queue", cluster.answer)
    monkeypatch.setattr(slurm, "cancel", cluster.withdrawn.extend)
    return cluster


@pytest.fixture
def sweep(desk):
    """Two runs on sketch, two on photo."""
    targets = {"a": "sketch", "b": "sketch", "c": "photo", "d": "photo"}
    return desk.sweep([FrozenRun(name, [f"split.target={value}"], config(value)) for name, value in targets.items()])


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


def test_the_exit_status_of_status_depends_on_the_states_and_all_lists_every_run(desk, sweep, command):
    for name in "abcd":
        desk.run(name, "done")
    for state, expected in (("done", 0), ("failed", 1), ("running", 3)):
        desk.run("a", state)
        code, output, _ = command("status")
        assert code == expected, state
        assert "4 runs" in output
    rows = {line.split()[0] for line in command("status", "--all")[1].splitlines() if line.startswith("  ")}
    assert rows >= set("abcd")


def test_status_of_a_part_of_a_sweep(desk, sweep, command):
    desk.run("c", "done")
    desk.run("d", "done")
    code, output, _ = command("status", "2026-01", "split.target=photo")
    assert (code, output.splitlines()[1]) == (0, "2 done")
    desk.sweep(["x"], LATER)
    assert command("status")[1].startswith(f"sweep {LATER}")
    assert command("status", FIRST)[1].startswith(f"sweep {FIRST}")


def test_status_without_an_answer_of_slurm_shows_the_files(desk, sweep, command, cluster):
    cluster.queue = None
    desk.submitted(sweep, [["a"]], jobs=["7"])
    desk.run("b", "done")
    code, output, _ = command("status")
    assert code == 3
    assert "1 done | 1 pending | 2 missing" in output
    assert "SLURM does not answer" in output


def test_watching_ends_with_the_sweep_and_then_shows_it_whole(desk, sweep, command):
    for name in "abcd":
        desk.run(name, "done")
    _, output, _ = command("status", "--watch", "--every", "0.01")
    assert "the table:" in output
    desk.sweep(["x"], LATER)
    for words in (["--watch", FIRST], [FIRST, "--watch"], ["--every", "0.01", "--watch", "2026-01"]):
        code, output, errors = command("status", *words)
        assert (code, errors) == (0, ""), words
        assert output.count("4 done") == 2, words


def test_ctrl_c_ends_watching_with_the_whole_picture(desk, sweep, command, monkeypatch):
    desk.run("a", "running")

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gsdg.sweep.status_text.time.sleep", interrupted)
    code, output, _ = command("status", "--watch")
    assert code == 3
    assert "heartbeat" in output


# ---- cancel -------------------------------------------------------------------------------------------------------


def test_cancel_notes_it_and_takes_the_tasks_out_of_the_queue(desk, sweep, command, cluster, monkeypatch):
    cluster.hold(desk.submitted(sweep, [["a"], ["b", "c"]], jobs=["7_0", "7_1"]), "7_0", "7_1")
    desk.run("d", "done")
    noted_first = []
    monkeypatch.setattr(slurm, "cancel", lambda jobs: noted_first.append((events(sweep), jobs)))
    code, output, _ = command("cancel", "--yes")
    assert code == 0
    assert noted_first == [([["a", "b", "c"]], ["7_0", "7_1"])]
    assert "3 of 4 runs cancelled (3 pending)" in output
    assert "2 tasks removed from SLURM's queue" in output


def test_a_task_is_removed_from_the_queue_once_all_its_unfinished_runs_are_cancelled(desk, sweep, command, cluster):
    array = desk.submitted(sweep, [["a", "c"], ["b", "d"]], jobs=["7_0", "7_1"])
    cluster.hold(array, "7_0", "7_1", state="RUNNING")
    desk.run("a", "running")
    desk.run("b", "done")
    _, output, _ = command("cancel", FIRST, "split.target=photo")
    assert (events(sweep), cluster.withdrawn) == ([["c", "d"]], ["7_1"])  # the other task of the two still has a
    assert "1 task removed" in output
    assert "1 task left" in output
    assert "1 of 2 runs cancelled (1 running)" in command("cancel", FIRST, "split.target=sketch")[1]
    assert (events(sweep)[1:], cluster.withdrawn) == ([["a"]], ["7_1", "7_0"])


def test_runs_that_another_sweep_queued_are_cancelled_where_they_are(desk, sweep, command, cluster):
    later = desk.sweep([FrozenRun("a", [], config()), FrozenRun("x", [], config())], LATER)
    cluster.hold(desk.submitted(sweep, [["a"]], jobs=["7"]), "7")
    cluster.hold(desk.submitted(later, [["x"]], jobs=["8"]), "8")
    command("cancel", LATER)
    assert sorted(cluster.withdrawn) == ["7", "8"]
    assert "a" in events(sweep)[0]
    assert "x" in events(later)[0]


def test_while_slurm_is_silent_it_is_noted_and_a_second_time_empties_the_queue(desk, sweep, command, cluster):
    array = desk.submitted(sweep, [["a"]], jobs=["7"])
    cluster.queue = None
    assert "Cancel again" in command("cancel", "--yes")[1]
    assert (events(sweep), cluster.withdrawn) == ([["a"]], [])
    cluster.queue = {}
    cluster.hold(array, "7")
    command("cancel", "--yes")
    assert (events(sweep), cluster.withdrawn) == ([["a"]], ["7"])


def test_runs_outside_of_a_task_are_left_alone(desk, sweep, command, cluster):
    desk.submitted(sweep, [["b"]], jobs=["7"])  # over by now
    desk.working("a")
    desk.working("b")
    code, output, _ = command("cancel", "--yes")
    assert (code, events(sweep)) == (0, [])
    assert "0 of 4 runs cancelled\n" in output
    assert "left alone: run a" in output
    assert "left alone: run b" in output


def test_a_task_without_slurm_is_told_by_the_sweeps_events(desk, sweep, command, cluster):
    process = desk.process("import time; print('ready'); time.sleep(600)", str(sweep.jobs))
    desk.submitted(sweep, [["a", "b", "c", "d"]], jobs=[str(process.pid)], cluster="local")
    assert "1 task left" in command("cancel", "--yes")[1]
    assert (sorted(events(sweep)[0]), cluster.withdrawn) == (["a", "b", "c", "d"], [])


# ---- which sweep, whose, and whether the user means it ------------------------------------------------------------


@pytest.fixture
def queued(desk, sweep, cluster):
    """The sweep with two of its runs in the queue."""
    cluster.hold(desk.submitted(sweep, [["a"], ["b"]], jobs=["7_0", "7_1"]), "7_0", "7_1")
    return sweep


def test_without_a_name_and_a_terminal_nothing_is_cancelled_but_the_command_that_does_is_printed(
    queued, command, cluster, monkeypatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    code, output, errors = command("cancel", "split.target=sketch")
    assert (code, events(queued), cluster.withdrawn) == (2, [], [])
    assert f"the latest is {FIRST} (yours, launched" in output
    assert "2 of its 2 runs (2 pending)" in output
    (line,) = [line for line in errors.splitlines() if "python -m gsdg.sweep" in line]
    words = shlex.split(line.partition("python -m gsdg.sweep ")[2])
    assert words[:3] == ["cancel", FIRST, "split.target=sketch"]
    assert commands.main(words) == 0
    assert (events(queued), cluster.withdrawn) == ([["a", "b"]], ["7_0", "7_1"])


def test_without_a_name_a_terminal_is_asked(queued, command, monkeypatch):
    """A real terminal: what the user types comes from a pseudo-terminal."""
    for answer, expected, cancelled in (("", 1, []), ("n", 1, []), ("\x04", 1, []), ("y", 0, [["a", "b"]])):
        controller, terminal = os.openpty()
        os.write(controller, f"{answer}\n".encode())
        with os.fdopen(terminal, "r") as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            code, output, _ = command("cancel")
        os.close(controller)
        assert (code, events(queued)) == (expected, cancelled), answer
        assert "Cancel these runs? [y/N]" in output
        assert ("nothing was cancelled" in output) == (code == 1)


def test_a_name_or_yes_is_enough_and_where_nothing_is_queued_nothing_is_asked(sweep, queued, command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert command("cancel", FIRST, "split.target=photo")[0] == 0
    assert events(queued) == []
    assert command("cancel", "split.target=photo")[1] == f"sweep {FIRST}: 0 of 2 runs cancelled\n"
    assert command("cancel", "--yes")[0] == 0
    assert events(queued) == [["a", "b"]]


def test_the_latest_is_the_last_that_was_launched_whatever_it_is_called(desk, sweep, command):
    desk.sweep(["x"], "a_name_of_my_own")
    time.sleep(0.01)
    desk.sweep(["x", "y"], LATER)
    assert command("status")[1].startswith(f"sweep {LATER}")
    time.sleep(0.01)
    desk.sweep(["z"], "a_name_of_my_own")
    assert command("status")[1].startswith("sweep a_name_of_my_own")
    assert "2 runs" in command("status")[1]


def test_the_latest_is_ones_own_before_a_colleagues(desk, sweep, command, queued, cluster):
    colleagues = desk.sweep(["x"], LATER)
    os.chown(colleagues.path, 65534, -1)
    cluster.hold(desk.submitted(colleagues, [["x"]], jobs=["8"]), "8")
    assert command("status")[1].startswith(f"sweep {FIRST}")
    command("cancel", "--yes")
    assert (events(queued), events(colleagues)) == ([["a", "b"]], [])
    os.chown(sweep.path, 65534, -1)
    assert command("status")[1].startswith(f"sweep {LATER}")


def as_nobody(*words: str) -> subprocess.CompletedProcess:
    """Run the command as another user."""
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("becoming another user needs root, and setpriv")
    somebody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    command = [*somebody, sys.executable, "-m", "gsdg.sweep", *words]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/nowhere"}
    attempt = [*somebody, sys.executable, "-c", "import gsdg"]
    if subprocess.run(attempt, cwd="/", env=environment, capture_output=True).returncode:
        pytest.skip("another user may not read this checkout or its Python")
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def shared():
    """A folder that everybody may look into; pytest's own are private."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_cancelling_a_colleagues_sweep_is_a_message(shared):
    """The sweep belongs to another user, and its process is alive."""
    desk = Desk(shared / "runs")
    sweep = desk.sweep(["a"])
    sweep.write({"launcher": {"cluster": "local", "runs_per_task": 1}}, [])
    process = desk.process("import time; print('ready'); time.sleep(600)", str(sweep.jobs))
    desk.submitted(sweep, [["a"]], jobs=[str(process.pid)], cluster="local")
    try:
        done = as_nobody("cancel", sweep.name, f"--runs-dir={desk.runs_dir}")
        retried = as_nobody("retry", sweep.name, f"--runs-dir={desk.runs_dir}")
    finally:
        desk.clear()
    for answer in (done, retried):
        assert answer.returncode == 2, answer.stderr
        assert "Traceback" not in answer.stderr
    assert f"sweep {sweep.name} was submitted by root, and you may not write in {sweep.path}" in done.stderr
    assert "Ask root to cancel it" in done.stderr
    assert events(sweep) == []
    assert "Permission denied" in retried.stderr


def test_what_slurm_does_not_let_this_user_cancel_is_said(queued, command, monkeypatch):
    """In a colleague's folder that the group may write, the cancellation is noted, and the tasks see it."""

    def refused(jobs: list[str]) -> None:
        raise UserError("scancel: error: Kill job error on job id 7: Access/permission denied")

    monkeypatch.setattr(slurm, "cancel", refused)
    code, output, _ = command("cancel", FIRST)
    assert (code, events(queued)) == (0, [["a", "b"]])
    denied = "scancel: error: Kill job error on job id 7: Access/permission denied"
    assert f"2 tasks not removed from SLURM's queue: {denied}" in output
    assert "a task that starts reads this and ends" in output


def test_a_run_that_two_sweeps_have_queued_is_cancelled_in_both(desk, sweep, command, cluster):
    """Each task reads the events of its own sweep only."""
    later = desk.sweep([FrozenRun("a", [], config()), FrozenRun("x", [], config())], LATER)
    cluster.hold(desk.submitted(sweep, [["a", "c"]], jobs=["7"]), "7", state="RUNNING")
    cluster.hold(desk.submitted(later, [["a", "x"]], jobs=["8"]), "8", state="RUNNING")
    command("cancel", FIRST, "split.target=sketch")
    assert [runs for folder in (sweep, later) for runs in events(folder)] == [["a"], ["a"]]
    assert cluster.withdrawn == []


# ---- retry, prepare -----------------------------------------------------------------------------------------------


def test_retry_hands_the_chosen_runs_on(sweep, command, monkeypatch):
    asked = []
    monkeypatch.setattr("gsdg.sweep.submit.resubmit", lambda *arguments: asked.append(arguments))
    for words, resubmit in (([], "failed"), (["--resubmit", "missing"], "missing")):
        assert command("retry", FIRST, "split.target=photo", *words)[0] == 0
        named, runs, how = asked.pop()
        assert (named.name, [run.run_id for run in runs], how) == (FIRST, ["c", "d"], resubmit)


def test_prepare_hands_on_every_runs_config(command, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("gsdg.sweep.prefetch.prefetch", asked.extend)
    assert command("prepare", "-m", "split.target=0,15", f"runs_dir={tmp_path}", "algorithm=erm")[0] == 0
    assert [config["split"]["target"] for config in asked] == [["0"], ["15"]]


# ---- plan ---------------------------------------------------------------------------------------------------------

SWEEP = ["split.target=0,15", "split.trial_seed=0,1", "algorithm=erm", "hydra/launcher=slurm", "trainer.eval_every=50"]


def test_a_plan_knows_what_is_done_and_what_the_rest_costs(command, tmp_path):
    from gsdg.sweep.compose import from_command_line
    from gsdg.sweep.enumerate_runs import freeze_runs

    overrides = [*SWEEP, f"runs_dir={tmp_path / 'runs'}", "hydra.launcher.runs_per_task=2"]
    composer, jobs, _ = from_command_line(overrides)
    first, second, *_ = freeze_runs(composer, jobs)
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


def test_a_mistake_is_a_message_and_exit_status_2(sweep, command):
    for words, message in (
        (["status", "nix"], "no sweep is called nix"),
        (["status", "one", "two"], "several sweeps are named: one, two"),
        (["cancel", "split.target=nix"], "no run of 4 has split.target=nix"),
        (["plan", "algorithm=nix"], "algorithm=nix"),
        (["plan", "algorithm=erm", "split.target=nix"], "nix"),
    ):
        code, _, errors = command(*words)
        assert code == 2, words
        assert errors.startswith("error: ")
        assert message in errors, words
    code, _, errors = command("status", "--al", "--nix")
    assert code == 2
    assert "--nix" in errors


def test_words_may_follow_options():
    chosen = commands.options(["status", "--runs-dir", "/x", "name", "--all", "a=1"])
    assert (sorted(chosen.words), chosen.all) == (["a=1", "name"], True)


def test_it_runs_as_a_module(sweep, desk):
    command = [sys.executable, "-m", "gsdg.sweep", "status", f"--runs-dir={desk.runs_dir}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "4 missing" in done.stdout
