"""Whole sweeps on a real cluster: what is submitted, what is left out, what they run; tests/sweep has the rest."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster_sweeps import HOLD, RUN, Sweeps
from helpers import REPOSITORY, Launcher, assert_same, copy_checkout, only_run, status
from lab import HALF_A_NODE

from gsdg.sweep.folder import all_sweeps, find_sweep
from gsdg.utils.json_files import read_json

pytestmark = pytest.mark.slow
SHORT = (*RUN, "trainer.steps=20", "trainer.eval_every=10")


@pytest.fixture
def sweeps(cluster, tmp_path) -> Sweeps:
    return Sweeps(cluster, tmp_path / "runs")


def environments(run: Path) -> list[dict]:
    """One entry per start of the run."""
    return [json.loads(line) for line in (run / "environment.jsonl").read_text().splitlines()]


def test_the_same_command_again_submits_only_what_is_missing_or_failed(sweeps):
    sweep = (*SHORT, "optimizer=sgd", "optimizer.lr=1e-3,1e30")
    refused = sweeps.launch(*sweep, "hydra.launcher.partition=gpuu", check=False)
    assert refused.returncode == 1
    assert "main" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not sweeps.lab.states()
    assert not all_sweeps(sweeps.runs_dir)

    sweeps.launch(*sweep)
    sweeps.wait_until_over()
    assert sweeps.states() == ["done", "failed"]
    assert "1 to submit" in sweeps.launch(*sweep, HOLD).stdout
    assert "failed" not in sweeps.command("status", check=False).stdout.splitlines()[1]  # it is pending
    assert "0 to submit" in sweeps.launch(*sweep).stdout, "queued runs are not submitted twice"
    (job,) = sweeps.lab.states()
    sweeps.release()
    sweeps.wait_until_over()
    assert sweeps.lab.state(job) == "FAILED", "an exception fails the run and its task"
    answer = sweeps.command("status", check=False)
    assert answer.returncode == 1
    assert "NonFinite" in answer.stdout

    (done,) = (run for run in sweeps.runs if status(run)["state"] == "done")
    before = (done / "records.jsonl").stat().st_mtime_ns
    assert "1 to submit" in sweeps.launch(*sweep[:-1], "optimizer.lr=1e-3", "resubmit=all").stdout
    sweeps.wait_until_over()
    assert (done / "records.jsonl").stat().st_mtime_ns != before
    assert len(environments(done)) == 1
    assert all(len(list(run.iterdir())) < 20 for run in sweeps.runs)


def test_a_job_runs_the_config_and_the_code_it_was_submitted_with(cluster, tmp_path):
    """YAML and code of the checkout are edited while the job is pending."""
    checkout = copy_checkout(tmp_path / "checkout")
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
    assert_same(only_run(desk.runs_dir), *sweeps.runs)
    (start,) = environments(*sweeps.runs)
    assert start["code"] == find_sweep(sweeps.runs_dir).read()["code"]["code"]
    assert start["job"] == job


def test_packed_runs_have_the_results_of_this_machine_whatever_the_shell_and_its_profile_set(sweeps, tmp_path):
    """Two runs at once in each of two tasks; one of each two fails. Each of the variables made every job end at once.

    The pretend nodes do not bind tasks to cores: every task sees the whole machine.
    """
    sweep = (*SHORT, "split.target=0,30", "optimizer=sgd", "optimizer.lr=1e-3,1e30")
    harmful = {"SLURM_EXPORT_ENV": "NONE", "SRUN_EXPORT_ENV": "NONE", "SLURM_MEM_PER_CPU": "100", "SLURM_NTASKS": "2"}
    sweeps.environment |= {**harmful, "SBATCH_EXPORT": "NONE", "SBATCH_JOB_NAME": "mine", "SBATCH_TIMELIMIT": "0:01"}
    del sweeps.environment["OMP_NUM_THREADS"]
    profile = tmp_path / "profile"
    profile.write_text("export SLURM_EXPORT_ENV=NONE SRUN_EXPORT_ENV=NONE SLURM_MEM_PER_CPU=100\n")
    packs = ("hydra.launcher.runs_per_task=2", "hydra.launcher.side_by_side=2", "hydra.launcher.mem_gb=4")
    output = sweeps.launch(*sweep, *packs, f"hydra.launcher.setup=[source {profile}]").stdout
    assert "the jobs do not get SBATCH_EXPORT, SBATCH_JOB_NAME, SBATCH_TIMELIMIT, SLURM_EXPORT_ENV" in output
    assert "submitted: 2 tasks in 1 array" in output
    desk = Launcher(tmp_path / "desk")
    desk("-m", *sweep)
    sweeps.wait_until_over()
    assert sweeps.states() == ["done", "done", "failed", "failed"]
    for run in sweeps.runs:
        assert environments(run)[0]["device"] == "cpu, 1 threads", "the task has one core"
        if status(run)["state"] == "done":
            assert_same(desk.runs_dir / run.name, run)


def test_jobs_are_known_by_their_number_and_by_their_script_whatever_they_are_called(sweeps):
    """The jobs are renamed; then their numbers are removed, as if the launching process had been killed."""
    sweep = (*SHORT, "split.trial_seed=0,1", "hydra.launcher.name=mine", HOLD)
    sweeps.launch(*sweep)
    folder = find_sweep(sweeps.runs_dir)
    for job in sweeps.lab.states():
        assert "JobName=mine" in sweeps.lab.run("scontrol", "show", "job", job)
        sweeps.lab.run("scontrol", "update", f"jobid={job}", "name=another")
    assert "2 pending" in sweeps.command("status", folder.name, check=False).stdout
    lines = [line for line in folder.events() if line["event"] != "accepted"]
    (folder.path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "2 pending" in sweeps.command("status", folder.name, check=False).stdout
    assert "0 to submit" in sweeps.launch(*sweep).stdout, "queued runs are not submitted twice"
    assert "2 tasks removed from SLURM's queue" in sweeps.command("cancel", folder.name).stdout
    assert not sweeps.lab.states()


def test_cancel_by_filter_and_retry(sweeps):
    """Two runs per task: one is cancelled, the other one is done."""
    sweep = (*SHORT, "algorithm=erm,grad_surgery", "split.trial_seed=0,1")
    sweeps.launch(*sweep, "hydra.launcher.runs_per_task=2", HOLD)
    name = find_sweep(sweeps.runs_dir).name
    refused = sweeps.command("cancel", "algorithm=erm", "split.trial_seed=0", check=False)
    assert (refused.returncode, len(sweeps.lab.states())) == (2, 2), "no sweep is named, and nobody can be asked"
    assert f"cancel {name} algorithm=erm split.trial_seed=0 --runs-dir {sweeps.runs_dir} --yes" in refused.stderr
    output = sweeps.command("cancel", "algorithm=erm", "split.trial_seed=0", "--yes").stdout
    assert output.splitlines() == [
        f"sweep {name}: 1 of 1 run cancelled (1 pending)",
        "1 task left to stop the cancelled runs, which takes seconds",
    ]
    output = sweeps.command("cancel", name, "algorithm=grad_surgery").stdout
    assert output.splitlines() == [
        f"sweep {name}: 2 of 2 runs cancelled (2 pending)",
        "1 task removed from SLURM's queue",
    ]
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


def test_runs_of_a_task_run_one_after_another_unless_they_are_asked_to_run_side_by_side(sweeps):
    pack = ("hydra.launcher.runs_per_task=3", "hydra.launcher.mem_gb=6")
    sweeps.launch(*SHORT, "split.trial_seed=0,1,2", *pack)
    sweeps.wait_until_over()
    assert sweeps.states() == ["done"] * 3
    starts, ends = sweeps.started(), [status(run)["heartbeat"] for run in sweeps.runs]
    assert len(starts) == 3
    assert sum(start > min(ends) for start in starts.values()) == 2


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
    sweeps.launch(*sweep)  # killed between sbatch and submitit's renaming of the pickle, the job failed
    sweeps.wait_until_over()
    assert sweeps.states() == ["done"] * 6
    assert all("resuming" not in (run / "log.txt").read_text() for run in sweeps.runs)
    assert all(len((run / "environment.jsonl").read_text().splitlines()) == 1 for run in sweeps.runs)


def test_cancel_stops_what_is_running(sweeps):
    sweeps.launch(*RUN, "trainer.steps=100000", "split.trial_seed=0,1", "hydra.launcher.runs_per_task=2")
    sweeps.wait_for_step(50)
    sweeps.command("cancel", "split.trial_seed=0", "--yes")
    sweeps.lab.wait(lambda: len(list(sweeps.runs_dir.glob("*/config.json"))) == 2)
    states = {read_json(run / "config.json")["split"]["trial_seed"]: status(run)["state"] for run in sweeps.runs}
    assert states == {0: "stopped", 1: "running"}
    sweeps.command("cancel", "--yes")
    sweeps.wait_until_over()
    assert "2 cancelled" in sweeps.command("status", check=False).stdout


def test_a_search_waits_for_its_jobs_and_goes_on_after_a_kill(sweeps):
    """Optuna through SLURM: the launching process is killed while its first draws are in the queue."""
    pytest.importorskip("optuna")
    search = ("hydra/sweeper=optuna", "hydra.sweeper.n_jobs=2", "optimizer.lr=tag(log,interval(1e-4,1e-2))")
    words = ("-m", *HALF_A_NODE, *SHORT[:-1], "trainer.eval_every=10", *search, "hydra.sweeper.n_trials=3")
    command = [sys.executable, str(REPOSITORY / "launch.py"), *words, f"runs_dir={sweeps.runs_dir}"]
    process = subprocess.Popen(command, env=sweeps.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    sweeps.lab.wait(lambda: bool(sweeps.lab.states()), 120)
    process.kill()
    process.communicate()
    done = subprocess.run(command, env=sweeps.environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best of 3 draws" in done.stdout
    assert sweeps.states() == ["done"] * 3, "the draws that were in the queue are made once"
