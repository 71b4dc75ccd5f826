"""Whole sweeps on a real cluster: what is submitted, what is left out, what they run, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster_sweeps import HOLD, RUN, Sweeps, same_result
from helpers import REPOSITORY, Launcher, only_run, records_without_time, status
from lab import HALF_A_NODE

from gsdg.runs import read_json
from gsdg.sweep.folder import all_sweeps, find

pytestmark = pytest.mark.slow
SHORT = (*RUN, "trainer.steps=20", "trainer.eval_every=10")


@pytest.fixture
def sweeps(cluster, tmp_path) -> Sweeps:
    return Sweeps(cluster, tmp_path / "runs")


def submitted(sweeps: Sweeps) -> list[int]:
    """How many runs each submission asked for, in order."""
    found = [event for sweep in all_sweeps(sweeps.runs_dir) for event in sweep.events()]
    return [sum(map(len, event["packs"])) for event in found if event["event"] == "submitted"]


def test_the_same_command_again_submits_only_what_is_missing_or_failed(sweeps):
    sweep = (*SHORT, "optimizer=sgd", "optimizer.lr=1e-3,1e30", "algorithm=erm,grad_surgery")
    sweeps.launch(*sweep)
    sweeps.wait_until_over()
    assert sweeps.states() == ["done", "done", "failed", "failed"]

    assert "0 to submit" in sweeps.launch(*sweep, "resubmit=missing").stdout
    assert "2 to submit" in sweeps.launch(*sweep, HOLD).stdout
    assert "2 failed" not in sweeps.command("status", check=False).stdout.splitlines()[0]  # they are pending
    assert "0 to submit" in sweeps.launch(*sweep).stdout, "queued runs are not submitted twice"
    sweeps.release()
    sweeps.wait_until_over()

    wider = (*SHORT, "optimizer=sgd", "optimizer.lr=1e-3,1e-2", "algorithm=erm,grad_surgery")  # shares two runs
    assert "2 done" in sweeps.launch(*wider).stdout
    sweeps.wait_until_over()
    assert submitted(sweeps) == [4, 2, 2]
    assert sweeps.states() == ["done"] * 4 + ["failed"] * 2

    before = {run.name: (run / "records.jsonl").stat().st_mtime_ns for run in sweeps.runs}
    assert "4 to submit" in sweeps.launch(*wider, "resubmit=all").stdout
    sweeps.wait_until_over()
    again = [run for run in sweeps.runs if (run / "records.jsonl").stat().st_mtime_ns != before[run.name]]
    assert len(again) == 4
    assert all(len((run / "environment.jsonl").read_text().splitlines()) == 1 for run in again)
    assert all(len(list(run.iterdir())) < 20 for run in sweeps.runs)


def test_a_job_runs_the_config_and_the_code_it_was_submitted_with(cluster, tmp_path):
    """The checkout is edited, YAML and code, while the job waits."""
    checkout = tmp_path / "checkout"
    hidden = shutil.ignore_patterns(".*", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY, checkout, ignore=hidden)
    sweeps = Sweeps(cluster, tmp_path / "runs", checkout)
    sweeps.environment["PYTHONPATH"] = str(checkout)
    sweeps.launch(*SHORT, HOLD)
    (job,) = cluster.states()
    (checkout / "conf" / "model" / "convnet.yaml").write_text("nothing: sensible\n")
    (checkout / "gsdg" / "trainer.py").write_text("raise SystemExit('the edited code was run')\n")
    sweeps.release()
    sweeps.wait_until_over()

    desk = Launcher(tmp_path / "desk")
    assert desk(*SHORT).returncode == 0
    same_result(only_run(desk.runs_dir), *sweeps.runs)
    started = json.loads((sweeps.runs[0] / "environment.jsonl").read_text())
    assert started["code"] == find(sweeps.runs_dir).read()["code"]["code"]
    assert started["job"] == job


def test_code_that_changed_between_two_submissions_is_said(cluster, tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(REPOSITORY, checkout, ignore=shutil.ignore_patterns(".*", "runs", "*.egg-info", "__pycache__"))
    sweeps = Sweeps(cluster, tmp_path / "runs", checkout)
    sweeps.environment["PYTHONPATH"] = str(checkout)
    sweeps.launch(*SHORT, HOLD)
    cluster.run("scancel", *cluster.states())
    sweeps.wait_until_over()
    with (checkout / "gsdg" / "trainer.py").open("a") as file:
        file.write("# edited\n")
    answer = sweeps.command("retry", check=True)
    assert "other code" in answer.stdout
    sweeps.release()
    sweeps.wait_until_over()
    assert sweeps.states() == ["done"]


def test_more_tasks_than_an_array_may_have_become_several_arrays(sweeps):
    sweeps.lab.configure(max_array_size=6)
    sweep = (*SHORT, "split.trial_seed=0,1,2,3,4,5,6,7,8,9,10,11,12", "hydra.launcher.array_parallelism=6")
    answer = sweeps.launch(*sweep, HOLD)
    assert "13 tasks in 3 arrays" in answer.stdout
    limits = sweeps.lab.run("squeue", "--noheader", "--format=%i").split()
    assert sorted(limit.rpartition("%")[2].rstrip("]") for limit in limits) == ["2", "2", "2"]
    assert len(sweeps.lab.states()) == 13


@pytest.mark.parametrize("at_once", [1, 3])
def test_runs_packed_into_one_task_are_each_their_own(sweeps, tmp_path, at_once):
    """One of three fails: the others are done, with the results of the same runs at the desk."""
    sweep = (*SHORT, "optimizer=sgd", "optimizer.lr=1e-3,1e30,1e-2")
    pack = ("hydra.launcher.runs_per_task=3", f"hydra.launcher.side_by_side={at_once}", "hydra.launcher.mem_gb=6")
    sweeps.launch(*sweep, *pack, HOLD)
    assert len(sweeps.lab.states()) == 1
    sweeps.release()
    sweeps.wait_until_over()
    assert sweeps.states() == ["done", "done", "failed"]
    desk = Launcher(tmp_path / "desk")
    desk("-m", *sweep)
    for run in sweeps.runs:
        if status(run)["state"] == "done":
            same_result(desk.runs_dir / run.name, run)
    starts, ends = sweeps.started(), [status(run)["heartbeat"] for run in sweeps.runs]
    assert len(starts) == 3
    started_after_the_first_end = sum(start > min(ends) for start in starts.values())
    assert started_after_the_first_end == (0 if at_once == 3 else 2)


def test_the_launching_process_may_die_at_any_moment(sweeps):
    """It is killed at random moments, then the command is repeated: every run is submitted once."""
    sweep = (*SHORT, "split.trial_seed=0,1,2,3,4,5")
    command = [sys.executable, str(REPOSITORY / "launch.py"), "-m", *HALF_A_NODE, *sweep, f"runs_dir={sweeps.runs_dir}"]
    for seconds in (3.0, 5.0, 6.0):
        process = subprocess.Popen(command, cwd=REPOSITORY, env=sweeps.environment, stdout=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    sweeps.launch(*sweep)
    sweeps.wait_until_over()
    sweeps.launch(*sweep)  # what a kill between sbatch and submitit's last move left without its pickle
    sweeps.wait_until_over()
    assert sweeps.states() == ["done"] * 6
    assert all("resuming" not in (run / "log.txt").read_text() for run in sweeps.runs)
    assert all(len((run / "environment.jsonl").read_text().splitlines()) == 1 for run in sweeps.runs)


def test_cancel_by_filter_and_retry(sweeps):
    """Two runs a task: the one that is cancelled makes room, the other is done."""
    sweep = (*RUN, "trainer.steps=100", "algorithm=erm,grad_surgery", "split.trial_seed=0,1")
    sweeps.launch(*sweep, "hydra.launcher.runs_per_task=2", HOLD)
    said = sweeps.command("cancel", "algorithm=erm", "split.trial_seed=0").stdout
    assert "1" in said
    sweeps.command("cancel", "algorithm=grad_surgery")
    assert len(sweeps.lab.states()) == 1, "the task all of whose runs were cancelled is gone from the queue"
    sweeps.release()
    sweeps.wait_until_over()
    assert sweeps.states() == ["done"]
    answer = sweeps.command("status", check=False)
    assert answer.returncode == 1
    assert "3 cancelled" in answer.stdout
    sweeps.command("retry", "algorithm=grad_surgery")
    sweeps.release()
    sweeps.wait_until_over()
    assert sweeps.states() == ["done"] * 3


def test_cancel_stops_what_is_running(sweeps):
    sweeps.launch(*RUN, "trainer.steps=100000", "split.trial_seed=0,1", "hydra.launcher.runs_per_task=2")
    sweeps.wait_for_step(50)
    sweeps.command("cancel", "split.trial_seed=0")
    sweeps.lab.wait(lambda: len(list(sweeps.runs_dir.glob("*/config.json"))) == 2)
    states = {read_json(run / "config.json")["split"]["trial_seed"]: status(run)["state"] for run in sweeps.runs}
    assert states == {0: "stopped", 1: "running"}
    sweeps.command("cancel")
    sweeps.wait_until_over()
    assert "2 cancelled" in sweeps.command("status", check=False).stdout


def test_a_task_trains_with_the_cores_it_was_given_not_with_all_it_sees(sweeps):
    """The pretend nodes bind nothing: every task sees the whole machine."""
    del sweeps.environment["OMP_NUM_THREADS"]
    sweeps.launch(*SHORT)
    sweeps.wait_until_over()
    started = json.loads((sweeps.runs[0] / "environment.jsonl").read_text())
    assert started["device"] == "cpu, 1 threads"


def test_plan_says_what_would_run_and_submits_nothing(sweeps):
    sweep = (*SHORT, "split.trial_seed=0,1,2")
    sweeps.launch(*SHORT, "split.trial_seed=0")
    sweeps.wait_until_over()
    answer = sweeps._python("-m", "gsdg.sweep", "plan", *HALF_A_NODE, *sweep, f"runs_dir={sweeps.runs_dir}", check=True)
    assert "1 done" in answer.stdout
    assert "2 to submit" in answer.stdout
    assert not sweeps.lab.states()
    assert len(all_sweeps(sweeps.runs_dir)) == 1


def test_a_job_without_its_weights_fails_at_once_and_says_what_to_run_where(sweeps, tmp_path):
    sweeps.environment["TORCH_HOME"] = str(tmp_path / "empty")
    photos = ("dataset=image_folder", f"dataset.root={make_photos(tmp_path)}", "split.target=b", "model=resnet18")
    sweeps.launch("trainer.steps=1", "trainer.workers=0", "device=cpu", *photos, "hydra.launcher.mem_gb=3")
    sweeps.wait_until_over()
    assert sweeps.states() == ["failed"]
    assert "python -m gsdg.sweep prepare" in sweeps.log()


def test_a_gpu_that_does_not_work_is_a_failure_not_a_night_on_the_cpu(sweeps):
    """The pretend nodes give a task a GPU that is not there."""
    without_device = [text for text in SHORT if text != "device=cpu"]
    sweeps.launch(*without_device, "hydra.launcher.gpus_per_node=1")
    sweeps.wait_until_over()
    assert sweeps.states() == ["failed"]
    assert "device=cuda cannot be used here" in sweeps.command("status", check=False).stdout


def make_photos(tmp_path: Path) -> Path:
    from helpers import photos

    return photos(tmp_path / "photos")


# ---- refused, with nothing left in the queue or on disk ---------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["hydra.launcher.partition=gpuu"], "main"),
        (["hydra.launcher.gpus_per_node=3"], "gpu"),
        (["hydra.launcher.cpus_per_task=99"], "CPU"),
        (["hydra.launcher.signal_delay_s=120"], "20% of the time limit"),
        (["hydra.launcher.max_num_timeout=0"], "queued again"),
        (["hydra.launcher.nodes=2"], "one process"),
        (["resubmit=everything"], "missing, failed, all"),
        (["optimizer.lr=fast"], "optimizer.lr"),
        (["split.target=16"], "16"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_refused_before_anything_is_submitted(sweeps, overrides, said):
    answer = sweeps.launch(*SHORT, "split.trial_seed=0,1", *overrides, check=False)
    assert answer.returncode == 1
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not sweeps.lab.states()
    assert not all_sweeps(sweeps.runs_dir)


def test_submitting_from_inside_a_job_is_refused(sweeps, monkeypatch):
    sweeps.environment["SLURM_JOB_ID"] = "12"
    answer = sweeps.launch(*SHORT, check=False)
    assert answer.returncode == 1
    assert "inside" in answer.stderr
    assert not sweeps.lab.states()


def test_a_controller_that_does_not_answer_is_a_message(sweeps):
    sweeps.lab.kill_controller()
    answer = sweeps.launch(*SHORT, check=False)
    assert answer.returncode == 1
    assert "Traceback" not in answer.stderr
    assert "SLURM" in answer.stderr
    sweeps.lab.start_controller()
    assert not sweeps.lab.states()


def test_a_full_disk_is_a_message_and_nothing_is_submitted(sweeps, disk):
    runs = disk / "runs"
    runs.mkdir()
    with (disk / "filler").open("wb") as file:
        while shutil.disk_usage(disk).free > 8192:
            file.write(os.urandom(4096))
            file.flush()
    full = Sweeps(sweeps.lab, runs)
    answer = full.launch(*SHORT, "split.trial_seed=0,1,2,3,4,5,6,7", check=False)
    assert answer.returncode == 1
    assert "Traceback" not in answer.stderr
    assert "No space left" in answer.stderr
    assert not sweeps.lab.states()


def test_a_place_that_cannot_be_written_is_a_message(sweeps, disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    answer = Sweeps(sweeps.lab, disk / "runs").launch(*SHORT, check=False)
    assert answer.returncode == 1
    assert "Traceback" not in answer.stderr
    assert "runs_dir=" in answer.stderr
    assert not sweeps.lab.states()


def test_records_are_what_the_desk_would_have_made(sweeps, tmp_path):
    """Several targets and seeds at once: the table of the cluster is the table of the desk."""
    sweep = (*SHORT, "split.target=0,30", "split.trial_seed=0,1")
    sweeps.launch(*sweep)
    desk = Launcher(tmp_path / "desk")
    assert desk("-m", *sweep).returncode == 0
    sweeps.wait_until_over()
    assert [run.name for run in sweeps.runs] == sorted(path.parent.name for path in desk.runs_dir.glob("*/status.json"))
    for run in sweeps.runs:
        assert records_without_time(run) == records_without_time(desk.runs_dir / run.name)
