"""`python -m gsdg.runs list | show | remove`: what is shown, what is removed, and what is always kept."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from desk import FIRST, Desk, config, script
from helpers import REPOSITORY, in_case

from gsdg.runs.__main__ import main
from gsdg.runs.describe import age
from gsdg.runs.in_use import Queue, parse_squeue
from gsdg.runs.inventory import parse_duration, read_inventory, read_run
from gsdg.runs.removal import remove_runs
from gsdg.sweep.submit import launch_lock
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import write_json

DAY = 86400.0
IDS = {"erm": "aaaa00000001", "erm2": "aaaa00000002", "mgda": "bbbb00000003"}
WEIGHTS = {"model.pt": 4000, "weights/step_5.pt": 3000, "checkpoints/step_00000010.pt": 5000}


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """A function that puts a squeue on PATH which lists these jobs, or which fails."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def answer(*jobs: str, fails: bool = False, script: object = "/x.sh") -> None:
        listed = "".join(f"printf '%s\\037%s\\n' '{job}' '{script}'\n" for job in jobs)
        (programs / "squeue").write_text(f"#!/bin/sh\n{listed}exit {int(fails)}\n")
        (programs / "squeue").chmod(0o755)

    return answer


def whole_run(desk: Desk, run_id: str, state: str = "done", *, algorithm: str = "erm", **more: object) -> Path:
    """A run's folder with every kind of file that a run writes."""
    folder = desk.run(run_id, state, **more)
    write_json(folder / "status.json", json.loads((folder / "status.json").read_text()))  # as a run writes it
    files = {
        "config.json": config(algorithm__name=algorithm, optimizer={"lr": 3e-5}),
        "records.jsonl": {"step": 9, "accuracy": {"sketch": {"in": 0.5, "out": 0.25}}},
        "environment.jsonl": {"code": "c0de", "device": "cpu"},
        "log.txt": "log",
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content) + "\n")
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "weights").mkdir(exist_ok=True)
    for name, size in WEIGHTS.items():
        (folder / name).write_bytes(bytes(size))
    return folder


def three_runs(desk: Desk) -> dict[str, Path]:
    """erm: done, an hour ago; erm2: failed, 40 days ago; mgda: stopped, two days ago."""
    return {
        "erm": whole_run(desk, IDS["erm"], ago=3600.0),
        "erm2": whole_run(desk, IDS["erm2"], "failed", ago=40 * DAY, reason="ValueError: x"),
        "mgda": whole_run(desk, IDS["mgda"], "stopped", algorithm="mgda", ago=2 * DAY),
    }


@pytest.fixture
def runs(desk) -> dict[str, Path]:
    return three_runs(desk)


def contents(folder: Path) -> dict[str, str]:
    """{path: digest} of every file, without the files of locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".guard", ".lock")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def there(desk: Desk) -> set[str]:
    names = {value: name for name, value in IDS.items()}
    return {names.get(path.name, path.name) for path in desk.runs_dir.iterdir() if not path.name.startswith(".")}


def remove(desk: Desk, words: str) -> int:
    return main(["remove", *words.split(), "--runs-dir", str(desk.runs_dir)])


# ---- which runs ---------------------------------------------------------------------------------------------------


CHOSEN = {  # the words of `remove`: the runs that it removes
    "aaaa00000001": {"erm"},
    "b": {"mgda"},
    "aaaa00000001 bbbb": {"erm", "mgda"},
    "runs/bbbb00000003/": {"mgda"},
    "algorithm=erm": {"erm", "erm2"},
    "optimizer.lr=3e-5 algorithm=mgda": {"mgda"},
    "--older 30d": {"erm2"},
    "--older 1d": {"erm2", "mgda"},
    "--older 0s": {"erm", "erm2", "mgda"},
    "--failed": {"erm2"},
    "--failed --older 60d": set(),
    "algorithm=erm --older 30m": {"erm", "erm2"},
}


def test_the_chosen_runs_are_removed_and_no_others(desk):
    for words, gone in CHOSEN.items():
        runs = three_runs(desk)
        kept = {name: contents(runs[name]) for name in runs.keys() - gone}
        with in_case(words):
            assert remove(desk, f"{words} --yes") == 0
            assert there(desk) == set(runs) - gone
            assert {name: contents(runs[name]) for name in kept} == kept
            assert not list(desk.runs_dir.glob(".removed*"))


def test_without_yes_nothing_changes_and_the_command_that_is_shown_removes(desk, runs, capsys):
    before = contents(desk.runs_dir)
    assert remove(desk, "algorithm=erm --older 1h") == 0
    assert contents(desk.runs_dir) == before
    out = capsys.readouterr().out
    assert out.startswith("to remove: 2 runs, of 0.0 MB: checkpoints 0.0 MB, weights 0.0 MB, records and the rest")
    assert IDS["erm"] in out
    assert IDS["mgda"] not in out
    command = shlex.split(out.rpartition("To remove it: ")[2])
    assert command[:3] == ["python", "-m", "gsdg.runs"]
    assert main(command[3:]) == 0
    assert there(desk) == {"mgda"}


INVALID = {  # the words of `remove`: the message
    "": "which runs?",
    "--yes": "which runs?",
    "--keep-records --yes": "which runs?",
    "aaaa --yes": "several run ids begin with aaaa. There are: aaaa00000002, aaaa00000001.",
    "x --yes": "no run id begins with x. There are: aaaa00000002, bbbb00000003, aaaa00000001.",
    "optimizer.lr=1 --yes": "no run of 3 has optimizer.lr=1.\n",
    "--older=3 --yes": "'3' is not a duration.\nValid: a number and s, m, h, d or w",
}


def test_an_invalid_selection_is_explained_and_removes_nothing(desk, runs, capsys):
    for words, message in INVALID.items():
        with in_case(words):
            assert remove(desk, words) == 2
            assert message in capsys.readouterr().err
            assert there(desk) == set(runs)


def test_durations():
    assert [parse_duration(text) for text in ("45s", "1.5m", "12h", "30d", "2w")] == [45, 90, 43200, 30 * DAY, 14 * DAY]
    for text in ("", "d", "-1d", "1y", "1 d"):
        with pytest.raises(UserError, match="not a duration"):
            parse_duration(text)


def test_a_run_without_a_config_is_removed_and_folders_that_are_no_runs_are_never_touched(desk, runs, tmp_path):
    elsewhere = whole_run(Desk(tmp_path / "elsewhere"), "cccc00000004")
    (desk.runs_dir / "link").symlink_to(elsewhere)
    for name in ("my_notes", "model", ".hidden"):
        (desk.runs_dir / name).mkdir()
        (desk.runs_dir / name / "config.json").write_text('{"steps": 3}')
        (desk.runs_dir / name / "status.json").write_text('{"state": "done"}')
    (desk.runs_dir / "file.txt").write_text("mine")
    desk.run("dddd00000005", "failed", ago=DAY)  # it failed before its config was written
    assert remove(desk, "--failed --yes") == 0
    assert remove(desk, "--older 0s --yes") == 0
    assert there(desk) == {"my_notes", "model", "file.txt", "link"}
    assert contents(elsewhere)


# ---- records kept -------------------------------------------------------------------------------------------------


def test_with_keep_records_only_checkpoints_and_weights_are_removed_and_the_status_is_unchanged(desk, runs, capsys):
    kept = {
        run: {file: digest for file, digest in contents(run).items() if file not in WEIGHTS} for run in runs.values()
    }
    assert remove(desk, "--older 0s --keep-records") == 0
    assert "note: 1 run of these could be resumed" in capsys.readouterr().out
    assert remove(desk, "--older 0s --keep-records --yes") == 0
    assert {run: contents(run) for run in kept} == kept
    assert "removed: checkpoints and weights of 3 runs" in capsys.readouterr().out
    assert remove(desk, "--older 0s --keep-records") == 0
    assert "to remove: checkpoints and weights of 0 runs" in capsys.readouterr().out
    erm = whole_run(desk, IDS["erm"])
    (erm / "status.json").unlink()
    assert remove(desk, f"{IDS['erm']} --keep-records --yes") == 0
    assert not (erm / "status.json").exists()
    assert not [name for name in WEIGHTS if (erm / name).exists()]


# ---- live runs ----------------------------------------------------------------------------------------------------


def test_a_run_that_a_process_writes_is_kept_until_the_process_is_dead(desk, runs, capsys):
    process = desk.working(IDS["mgda"])
    for option in ("--keep-records", ""):
        assert remove(desk, f"--older 0s {option} --yes") == 0
        assert f"it is being written by process {process.pid} on" in capsys.readouterr().out
        assert contents(runs["mgda"]).keys() >= WEIGHTS.keys()
    process.kill()
    process.wait()
    assert remove(desk, "--older 0s --keep-records --yes") == 0
    assert not [name for name in WEIGHTS if (runs["mgda"] / name).exists()]
    assert remove(desk, "--older 0s --yes") == 0
    assert there(desk) == set()


def test_a_run_that_starts_between_the_listing_and_the_removal_is_kept(desk, runs):
    listed = [run for run in read_inventory(desk.runs_dir) if run.run_id == IDS["mgda"]]
    desk.working(IDS["mgda"])
    ((run, reason),) = remove_runs(listed, keep_records=False)
    assert run.run_id == IDS["mgda"]
    assert "is being written by process" in reason
    assert "mgda" in there(desk)


def test_a_run_of_another_host_is_kept_while_it_sends_heartbeats(desk, runs):
    whole_run(desk, "eeee00000006", "running", ago=30.0)
    whole_run(desk, "ffff00000007", "running", ago=300.0)
    assert remove(desk, "eeee ffff --yes") == 0
    assert there(desk) == {*runs, "eeee00000006"}


# ---- what submitted tasks need ------------------------------------------------------------------------------------


def submit_two_packs(desk: Desk) -> None:
    packs = [[IDS["erm"], IDS["erm2"]], [IDS["mgda"]]]
    desk.submitted(desk.sweep(list(IDS.values())), packs, jobs=["5_0", "5_1"])


IN_QUEUE = {  # the jobs that squeue lists: the runs that may be removed
    "5_0": {"mgda"},
    "5_1": {"erm", "erm2"},
    "5_[0-1]": set(),
    "5_[1-7%2]": {"erm", "erm2"},
    "5_[0,2,...]": set(),
    "50_0 55_1": {"erm", "erm2", "mgda"},
    "": {"erm", "erm2", "mgda"},
}


def test_every_run_of_a_task_that_slurm_still_has_is_kept(desk, squeue, capsys):
    """Also the runs that are done: a task that is requeued would find them missing, and train them again."""
    submit_two_packs(desk)
    for jobs, gone in IN_QUEUE.items():
        runs = three_runs(desk)
        squeue(*jobs.split())
        with in_case(jobs):
            assert remove(desk, "--older 0s --yes") == 0
            assert there(desk) == set(runs) - gone
            reason = f"sweep {FIRST} may still need it: job 5_"
            assert (reason in capsys.readouterr().out) == (gone != set(runs))


def test_where_slurm_does_not_answer_only_runs_of_finished_packs_are_removed(desk, squeue):
    submit_two_packs(desk)
    for failing in (False, True):  # without a squeue, and with one that fails
        three_runs(desk)
        if failing:
            squeue(fails=True)
        assert remove(desk, "--older 0s --yes") == 0
        assert there(desk) == {"mgda"}  # it was stopped: its task may be waiting to go on


def test_a_submission_whose_job_number_was_not_recorded_is_found_by_its_batch_script(desk, squeue):
    """The job's name would not do: users choose it with hydra.launcher.name."""
    sweep = desk.sweep(list(IDS.values()))
    array = desk.submitted(sweep, [[IDS["erm"]]], ago=DAY)
    desk.submitted(sweep, [[IDS["mgda"]]], ago=10.0, number=1)  # ten seconds ago: sbatch may be on its way
    for batch_script, kept in ((script(sweep, array), {"erm"}), ("/elsewhere/run.sh", set())):
        three_runs(desk)
        squeue("7_0", script=batch_script)
        assert remove(desk, f"{IDS['erm']} {IDS['mgda']} --yes") == 0
        assert there(desk) == {"erm2", "mgda"} | kept


def test_a_job_of_the_users_own_that_slurm_still_has_keeps_its_run(desk, squeue):
    whole_run(desk, IDS["erm"], "stopped", ago=DAY, job="77")
    whole_run(desk, IDS["mgda"], "stopped", ago=DAY, job="78")
    squeue("77")
    assert remove(desk, "--older 0s --yes") == 0
    assert there(desk) == {"erm"}


def test_a_task_without_slurm_keeps_its_runs_while_its_process_lives(desk, runs):
    sweep = desk.sweep(list(IDS.values()))
    process = desk.process("print('ready'); import time; time.sleep(600)", sweep.name)
    desk.submitted(sweep, [list(IDS.values())], jobs=[str(process.pid)], cluster="local", ago=DAY)
    assert remove(desk, "--older 0s --yes") == 0
    assert there(desk) == set(runs)
    process.kill()
    process.wait()
    assert remove(desk, "--older 0s --yes") == 0
    assert there(desk) == set()


def test_nothing_is_removed_while_a_sweep_is_being_submitted(desk, runs):
    command = [sys.executable, "-m", "gsdg.runs", "remove", "--failed", "--yes", "--runs-dir", str(desk.runs_dir)]
    with launch_lock(desk.runs_dir):
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        assert there(desk) == set(runs)
    assert process.wait(timeout=60) == 0
    assert there(desk) == {"erm", "mgda"}


def test_queues_are_read_in_every_form_that_squeue_writes():
    lines = ["12_3\x1fa", "12_[0-1,7,10-20:5%4]\x1fa", "13\x1fb c", "14_[0,4,...]\x1fd"]
    expected = {"12_3", "12_0", "12_1", "12_7", "12_10", "12_15", "12_20", "13"}
    assert parse_squeue(lines) == Queue(frozenset(expected), frozenset({"a", "b c", "d"}), frozenset({"14"}))
    assert parse_squeue(lines).has("14_99")
    assert not parse_squeue(lines).has("12_2")
    assert parse_squeue([]) == Queue(frozenset(), frozenset())


# ---- copies of the code -------------------------------------------------------------------------------------------


@pytest.fixture
def copies(desk) -> Path:
    for name in ("c0de1", "c0de2"):
        (desk.runs_dir / ".code" / name / "gsdg").mkdir(parents=True)
        (desk.runs_dir / ".code" / name / "gsdg" / "a.py").write_text("x = 1\n" * 50_000)
    return desk.runs_dir / ".code"


def submit_with_code(desk: Desk, code: str, job: str, number: int) -> None:
    sweep = desk.sweep(list(IDS.values()))
    array = f"gsdg-{sweep.name}-{number}"
    sweep.append("submitted", time=desk.now - DAY, cluster="slurm", array=array, packs=[[IDS["erm"]]], code=code)
    sweep.append("accepted", time=desk.now - DAY, array=array, jobs=[job], host="login")


def test_copies_of_the_code_are_removed_except_those_from_which_a_task_may_start(desk, runs, copies, squeue, capsys):
    """In a shared folder those of every user; where a task's code was not recorded, none."""
    for name in ("c0de2", "c0de3"):
        (desk.runs_dir / ".code-1000" / name / "gsdg").mkdir(parents=True)

    def left() -> list[str]:
        return sorted(path.name for path in desk.runs_dir.glob(".code*/*"))

    submit_with_code(desk, "c0de1", "5", 0)
    submit_with_code(desk, "c0de2", "6", 1)
    desk.submitted(desk.sweep(list(IDS.values())), [[IDS["erm"]]], jobs=["7"], number=2)
    squeue("7")
    assert remove(desk, "--code --yes") == 0
    assert left() == ["c0de1", "c0de2", "c0de2", "c0de3"]
    squeue("6")
    capsys.readouterr()
    assert remove(desk, "--code") == 0
    assert "to remove: 0 runs and 2 copies of the code" in capsys.readouterr().out
    assert left() == ["c0de1", "c0de2", "c0de2", "c0de3"]
    assert remove(desk, "--code --yes") == 0
    assert "removed: 0 runs and 2 copies of the code (0.3 MB)" in capsys.readouterr().out
    assert left() == ["c0de2", "c0de2"]
    assert there(desk) == set(runs)
    squeue()
    assert remove(desk, "--code --yes") == 0
    assert left() == []


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_removal_that_is_killed_leaves_no_partial_run_and_the_next_removal_finishes_it(desk, runs):
    before = contents(runs["erm2"])
    for number in range(4000):
        (runs["mgda"] / "checkpoints" / f"{number}").touch()
    command = [sys.executable, "-m", "gsdg.runs", "remove", IDS["mgda"], "--yes", "--runs-dir", str(desk.runs_dir)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(desk.runs_dir.glob(".removed*")):
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert there(desk) == {"erm", "erm2"}
    assert remove(desk, f"{IDS['erm']} --yes") == 0
    assert not list(desk.runs_dir.glob(".removed*"))
    assert contents(runs["erm2"]) == before


def test_a_run_that_the_file_system_refuses_to_remove_is_named_and_the_others_are_removed(desk, runs, capsys):
    """Its folder is a mount, which cannot be renamed."""
    if subprocess.run(["mount", "--bind", str(runs["erm2"]), str(runs["erm2"])], capture_output=True).returncode:
        pytest.skip("cannot mount here (needs root)")
    try:
        before = contents(runs["erm2"])
        assert remove(desk, "--older 0s --yes") == 1
        out = capsys.readouterr().out
        assert f"could not be removed: 1 run\n  {IDS['erm2']}  " in out
        assert "removed: 2 runs" in out
        assert contents(runs["erm2"]) == before
    finally:
        subprocess.run(["umount", str(runs["erm2"])], check=True)


# ---- list and show ------------------------------------------------------------------------------------------------


def test_list_shows_each_run_its_state_and_its_disk_space(desk, runs, copies, capsys):
    assert main(["list", "--runs-dir", str(desk.runs_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["run", "state", "algorithm", "dataset"]
    assert [line.split()[:3] for line in lines[1:4]] == [
        [IDS["erm2"], "failed", "erm"],
        [IDS["mgda"], "stopped", "mgda"],
        [IDS["erm"], "done", "erm"],
    ]
    assert lines[4].startswith("3 runs, 0.0 MB: checkpoints 0.0 MB, weights 0.0 MB, records")
    assert lines[5].startswith(f"in {desk.runs_dir}/.code (copies of the code")
    assert main(["list", "algorithm=mgda", "--runs-dir", str(desk.runs_dir)]) == 0
    assert IDS["erm"] not in capsys.readouterr().out


def test_sizes_are_those_of_the_files(desk, runs):
    assert list(read_run(runs["erm"]).sizes.values())[:2] == [5000, 7000]
    files = sum(path.stat().st_size for path in runs["erm"].rglob("*") if path.is_file())
    assert sum(read_run(runs["erm"]).sizes.values()) == files


def test_show_prints_the_state_of_a_run_and_which_task_needs_it(desk, runs, squeue, capsys):
    desk.submitted(desk.sweep(list(IDS.values())), [[IDS["erm2"]]], jobs=["5"])
    squeue("5")
    assert main(["show", "aaaa00000002", "--runs-dir", str(desk.runs_dir)]) == 0
    shown = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    shown = {key: value.strip() for key, value in shown.items()}
    assert shown["run"] == f"{IDS['erm2']}: failed, step 0 of 100"
    assert shown["reason"] == "ValueError: x"
    assert shown["last record"] == "step 9: sketch in 50.0 %, sketch out 25.0 %"
    assert shown["needed"].endswith("job 5 is still in SLURM's queue")


def test_a_folder_that_is_not_there_is_a_message(tmp_path, capsys):
    for command in (["list"], ["show", "a"], ["remove", "a"], ["remove", "a", "--yes"]):
        assert main([*command, "--runs-dir", str(tmp_path / "none")]) == 2
        assert "--runs-dir FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_reader_that_has_seen_enough_is_no_error(desk, runs):
    """As with `| head`. Without a buffer the closed pipe is noticed by the first line, else at the end."""
    command = f"{sys.executable} -m gsdg.runs list --runs-dir {desk.runs_dir} | true; exit ${{PIPESTATUS[0]}}"
    for unbuffered in ("", "1"):
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), unbuffered


def test_the_age_of_a_run_is_short(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 10 * DAY)
    ages = {
        -5: "0 s",
        99: "99 s",
        100: "2 min",
        5999: "100 min",
        6000: "1.7 h",
        2 * DAY - 1: "48.0 h",
        2 * DAY: "2.0 days",
    }
    assert {seconds: age(SimpleNamespace(last_seen=10 * DAY - seconds)) for seconds in ages} == ages


def test_nothing_is_imported_that_takes_seconds():
    code = "import sys, gsdg.runs.__main__; assert not {'torch', 'pandas', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)
