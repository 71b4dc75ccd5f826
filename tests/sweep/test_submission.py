"""What is submitted, and how: submitit's own executor with stand-ins for SLURM's programs (real ones: tests/slurm)."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
from contextlib import suppress
from dataclasses import replace

import pytest
from desk import Desk
from helpers import SMALL
from omegaconf import OmegaConf
from slurm_stand_in import StandIn

from gsdg.sweep import slurm
from gsdg.sweep.compose import from_command_line
from gsdg.sweep.enumerate_runs import freeze_runs
from gsdg.sweep.executor import Task
from gsdg.sweep.folder import FrozenRun, SweepFolder
from gsdg.sweep.run_states import run_states
from gsdg.sweep.submissions import History
from gsdg.sweep.submit import launch, resubmit
from gsdg.utils.errors import UserError

REFUSAL = "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed"
AUTO = [text for text in SMALL if text != "device=cpu"]


@pytest.fixture(scope="module")
def plans() -> list[FrozenRun]:
    """Three runs."""
    composer, jobs, _ = from_command_line([*AUTO, "split.trial_seed=0,1,2"])
    return freeze_runs(composer, jobs)


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> StandIn:
    cluster = StandIn(tmp_path / "slurm")
    monkeypatch.setenv("PATH", str(cluster.programs), prepend=":")
    for name in list(os.environ):
        if name.startswith(("SBATCH_", "SLURM_", "SRUN_")):
            monkeypatch.delenv(name)
    return cluster


@pytest.fixture
def submit(cluster, plans, tmp_path):
    """Launch the three runs with overrides of the launcher; returns the sweep."""

    def submit(
        *overrides: str, name="s", resubmit="failed", seeds=(0, 1, 2), runs_dir=tmp_path / "runs"
    ) -> SweepFolder:
        master = from_command_line(["hydra/launcher=slurm", *overrides])[2]
        parameters = OmegaConf.to_container(master.hydra.launcher)
        del parameters["_target_"]
        sweep = SweepFolder(runs_dir / ".sweeps" / name)
        runs = [replace(plans[seed], config={**plans[seed].config, "runs_dir": str(sweep.runs_dir)}) for seed in seeds]
        task = Task("slurm", parameters)
        launch(sweep, runs, task, overrides=["a=1"], environment={"MINE": "yes"}, resubmit=resubmit)
        return sweep

    return submit


def states(sweep: SweepFolder) -> list[str]:
    return [run.state for run in run_states(sweep.runs(), sweep.runs_dir, slurm.queue())]


def events(sweep: SweepFolder) -> list[str]:
    return [event["event"] for event in sweep.events()]


def end_jobs(cluster: StandIn) -> None:
    """Remove all jobs from the queue."""
    (cluster.folder / "scancelled").write_text(" ".join(map(str, cluster.submitted)) + "\n")


def packs(sweep: SweepFolder) -> list:
    """What the jobs will unpickle and call."""
    found = [pickle.loads(path.read_bytes()).function for path in sorted(sweep.jobs.glob("*_submitted.pkl"))]
    return sorted(found, key=lambda pack: pack.runs[0].run_id)


# ---- what a task is given ----------------------------------------------------------------------------------------


def test_every_run_is_in_a_task_with_what_it_needs(cluster, submit, plans, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sweep = submit()
    assert states(sweep) == ["pending"] * 3
    assert sorted(pack.runs[0].run_id for pack in packs(sweep)) == sorted(run.run_id for run in plans)
    for pack in packs(sweep):
        assert pack.grace == 105, "signal_delay_s=120, less 15 s to put the task back into the queue"
        assert pack.environment["MINE"] == "yes"
        assert pack.environment["GSDG_OFFLINE"] == f"cd {tmp_path} && python -m gsdg.sweep prepare a=1"
        assert pack.environment["HF_HUB_OFFLINE"] == "1"
        assert (pack.from_scratch, pack.submission, pack.side_by_side) == (False, "gsdg-s-0", 1)
        assert pack.runs[0].config["device"] == "cuda"
    options = cluster.options(101)
    assert (options["chdir"], options["array"], options["requeue"]) == (str(tmp_path), "0-2%3", "")
    assert {run.config["device"] for run in sweep.runs()} == {"cuda"}
    printed = capsys.readouterr().out
    assert f"follow it:  python -m gsdg.sweep status s --watch --runs-dir {tmp_path / 'runs'}" in printed.splitlines()
    assert "note:" not in printed, "the shell has no variables of SLURM"


def test_a_task_that_asks_for_a_gpu_in_any_way_trains_on_nothing_else(cluster, submit):
    no_gpus_per_node = "hydra.launcher.gpus_per_node=null"
    for name, device, overrides in (
        ("cpu", "auto", ("hydra/launcher=slurm_cpu",)),
        ("type", "cuda", ("hydra.launcher.gpus_per_node=a100:1",)),
        ("gres", "cuda", ("hydra.launcher.gres=gpu:a100:1", no_gpus_per_node)),
        ("gpus", "cuda", ("+hydra.launcher.additional_parameters.gpus=a100:1", no_gpus_per_node)),
    ):
        sweep = submit(*overrides, name=name)
        assert {run.config["device"] for run in sweep.runs()} == {device}, name
        assert {run.config["device"] for pack in packs(sweep) for run in pack.runs} == {device}, name
        end_jobs(cluster)
    assert cluster.options(102)["gpus-per-node"] == "a100:1"


def test_resubmit_all_makes_every_run_afresh_those_too_that_are_done(submit, plans, tmp_path):
    Desk(tmp_path / "runs").run(plans[0].run_id, "done")
    sweep = submit(resubmit="all")
    assert all(pack.from_scratch for pack in packs(sweep))
    assert states(sweep) == ["pending"] * 3


def test_other_users_cannot_write_what_the_jobs_run_and_a_damaged_copy_of_the_code_is_repaired(
    cluster, submit, tmp_path
):
    runs_dir = tmp_path / "runs"
    runs_dir.mkdir(mode=0o755)
    before = os.umask(0)
    try:
        sweep = submit()
    finally:
        os.umask(before)
    copy = list((runs_dir / ".code").rglob("*"))
    pickles = list(sweep.jobs.glob("*_submitted.pkl"))
    assert len(pickles) == 3
    executed = [runs_dir / ".code", sweep.path, sweep.jobs, *pickles, *copy]
    assert not [path for path in executed if path.stat().st_mode & 0o022]
    assert (sweep.path.parent.stat().st_mode & 0o7777) == 0o1777
    (damaged,) = (path for path in copy if path.name == "process_identity.py")
    damaged.unlink()
    end_jobs(cluster)
    submit(name="t")
    assert damaged.exists()
    end_jobs(cluster)
    runs_dir.chmod(0o777)
    with pytest.raises(UserError, match=rf"chmod \+t {runs_dir}"):
        submit(name="u")


# ---- names, numbers, order ---------------------------------------------------------------------------------------


def test_no_arrays_name_is_used_twice_and_the_lock_is_held_while_each_is_submitted(cluster, submit):
    """Not by retry, a second launch of the name, or several arrays: a status must name exactly one submission."""
    (cluster.folder / "max_array_size").write_text("2\n")
    sweep = submit("hydra.launcher.array_parallelism=2")
    end_jobs(cluster)
    resubmit(sweep, sweep.runs(), "failed")
    names = [event["array"] for event in sweep.events() if event["event"] == "submitted"]
    assert names == ["gsdg-s-0", "gsdg-s-1", "gsdg-s-2", "gsdg-s-3"]
    assert [pack.submission for pack in packs(sweep)].count("gsdg-s-2") > 0
    assert [cluster.lock(job) for job in (101, 102, 103, 104)] == ["held"] * 4
    assert cluster.options(102)["array"] == "0-1%1", "the two arrays share array_parallelism=2"


def test_code_that_changed_between_two_submissions_is_noted(cluster, submit, capsys):
    sweep = submit()
    assert "other code" not in capsys.readouterr().out
    end_jobs(cluster)
    lines = [{**event, "code": "0123456789ab"} for event in sweep.events()]
    (sweep.path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    resubmit(sweep, sweep.runs(), "failed")
    assert "submitted before with other code (0123456789ab)" in capsys.readouterr().out


def test_submissions_are_numbered_over_all_sweeps(cluster, submit):
    first, second = submit(), submit(name="t", seeds=(0,), resubmit="all")
    assert "submitted" not in events(second), "it is queued"
    end_jobs(cluster)
    submit(name="t", seeds=(0,))
    orders = [event["order"] for sweep in (first, second) for event in sweep.events() if event["event"] == "submitted"]
    assert orders == [1, 2]


def test_an_array_is_known_though_the_launching_process_died_before_its_note(cluster, submit, capsys):
    sweep = submit()
    lines = (sweep.path / "events.jsonl").read_text().splitlines(keepends=True)
    (sweep.path / "events.jsonl").write_text(lines[0])  # all that was written before the process died
    assert states(sweep) == ["pending"] * 3
    history = History(sweep.runs_dir, slurm.queue())
    assert [history.task(run.run_id).job for run in sweep.runs()] == ["101_0", "101_1", "101_2"]
    capsys.readouterr()
    submit()
    assert "0 to submit" in capsys.readouterr().out
    assert cluster.submitted == [101]


def test_a_job_may_have_the_name_of_another_array(cluster, submit):
    sweep = submit("hydra.launcher.name=gsdg-s-7")
    assert cluster.options(101)["job-name"] == "gsdg-s-7"
    assert states(sweep) == ["pending"] * 3


def test_a_name_that_is_used_again_keeps_the_earlier_runs(cluster, submit, plans):
    sweep = submit(seeds=(0, 1))
    created = sweep.created
    submit(seeds=(1, 2))
    assert [run.run_id for run in sweep.runs()] == [run.run_id for run in plans]
    assert states(sweep) == ["pending"] * 3
    assert [len(event["packs"]) for event in sweep.events() if event["event"] == "submitted"] == [2, 1]
    assert sweep.created > created


def test_a_refused_launch_leaves_a_name_that_is_used_again_as_it_was(cluster, submit):
    sweep = submit(seeds=(0,))
    before = sweep.launch_files()
    cluster.refuse("test", "sbatch: error: invalid partition specified: gpuu")
    with pytest.raises(UserError, match="main"):
        submit("hydra.launcher.partition=gpuu", seeds=(1, 2))
    assert sweep.launch_files() == before
    with pytest.raises(UserError, match="main"):
        submit(name="new", seeds=(1, 2))
    assert not (sweep.path.parent / "new").exists()


# ---- refused -----------------------------------------------------------------------------------------------------


def test_where_nothing_can_be_submitted_the_reason_is_given_and_nothing_is_left(cluster, submit, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="Valid: missing, failed, all"):
        submit(resubmit="everything")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(UserError, match="this is inside job 12 of SLURM"):
        submit()
    monkeypatch.delenv("SLURM_JOB_ID")
    with monkeypatch.context() as patched:
        patched.setenv("PATH", "/nowhere")
        with pytest.raises(UserError, match="there is no SLURM here"):
            submit()
    cluster.switch("silent")
    with pytest.raises(slurm.SlurmNotResponding):
        submit()
    assert not (tmp_path / "runs" / ".sweeps" / "s").exists()
    assert cluster.submitted == []


def test_a_full_or_a_read_only_disk_is_a_message_and_nothing_is_submitted(cluster, submit, disk):
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    for reason in ("No space left", "Read-only"):
        with pytest.raises(UserError, match=f"(?s){reason}.*runs_dir="):
            submit(runs_dir=disk / "runs")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert cluster.submitted == []


# ---- refused half-way --------------------------------------------------------------------------------------------


@pytest.fixture
def three_arrays(cluster) -> StandIn:
    (cluster.folder / "max_array_size").write_text("1\n")
    return cluster


def test_what_was_submitted_before_a_refusal_is_withdrawn(three_arrays, submit, tmp_path):
    three_arrays.refuse(3, REFUSAL)
    with pytest.raises(UserError, match="(?s)runs_per_task.*2 tasks submitted before it withdrawn: nothing"):
        submit()
    sweep = SweepFolder(tmp_path / "runs" / ".sweeps" / "s")
    assert three_arrays.scancelled.split() == ["101", "102"]
    assert states(sweep) == ["cancelled"] * 3
    assert events(sweep) == ["submitted", "accepted", "submitted", "accepted", "submitted", "cancelled"]
    noted = (three_arrays.folder / "events_at_scancel").read_text().splitlines()
    assert json.loads(noted[-1])["event"] == "cancelled", "noted before SLURM is asked"


def test_what_slurm_took_and_did_not_answer_is_withdrawn_too(three_arrays, submit):
    """sbatch failed after the controller had queued the array: its job number was never read."""
    three_arrays.switch("no_answer.2")
    with pytest.raises(UserError, match="2 tasks submitted before it withdrawn"):
        submit()
    assert three_arrays.scancelled.split() == ["101", "102"]


def test_where_slurm_is_silent_in_the_withdrawal_its_tasks_end_by_themselves(three_arrays, submit, tmp_path):
    three_arrays.refuse(2, REFUSAL)
    three_arrays.switch("silent_after_refusal")
    message = r"(?s)may still be queued: .*They end as soon as.*gsdg.sweep cancel s --runs-dir"
    with pytest.raises(UserError, match=message):
        submit()
    sweep = SweepFolder(tmp_path / "runs" / ".sweeps" / "s")
    assert events(sweep)[-1] == "cancelled"
    (three_arrays.folder / "silent").unlink()
    (pack,) = packs(sweep)
    pack()  # starts nothing
    assert states(sweep) == ["cancelled"] * 3
    assert [path.name for path in sweep.runs_dir.iterdir() if not path.name.startswith(".")] == []


# ---- the shell's variables ---------------------------------------------------------------------------------------

OF_SBATCH = ("JOB_NAME", "EXPORT", "TIMELIMIT", "ARRAY_INX", "WAIT", "SOMETHING_NEW")
OF_SRUN = ("SLURM_EXPORT_ENV", "SRUN_EXPORT_ENV", "SLURM_MEM_PER_CPU", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK")
HARMFUL = dict.fromkeys((*(f"SBATCH_{name}" for name in OF_SBATCH), *OF_SRUN), "1")
HARMLESS = {"SLURM_CONF": "/etc/slurm/slurm.conf", "SLURM_UMASK": "007", "SLURM_ROOT": "/opt/slurm", "TORCH_HOME": "/w"}


def test_the_shells_variables_change_nothing_and_that_is_said(cluster, submit, monkeypatch, capsys):
    for name, value in {**HARMFUL, **HARMLESS}.items():
        monkeypatch.setenv(name, value)
    submit()
    for when in (101, "tested"):
        environment = cluster.environment(when)
        assert not HARMFUL.keys() & environment.keys()
        assert {name: environment[name] for name in HARMLESS} == HARMLESS
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: of this shell")]
    assert all(name in note for name in HARMFUL)
    assert not any(name in note for name in HARMLESS)
    assert {name: os.environ[name] for name in HARMFUL} == HARMFUL, "this process's own are as before"


PLACES = ("partition", "account", "qos", "constraint", "reservation", "wckey")
DEFAULTS = {f"SBATCH_{name.upper()}": name for name in PLACES}


def test_where_to_run_is_taken_from_the_shell_for_this_submission_and_for_retry(cluster, submit, monkeypatch, capsys):
    for name in DEFAULTS:
        monkeypatch.setenv(name, f"my_{name}")
    sweep = submit()
    assert "note: from this shell: SBATCH_PARTITION=my_SBATCH_PARTITION, SBATCH_ACCOUNT=" in capsys.readouterr().out
    for name in DEFAULTS:
        monkeypatch.delenv(name)
    end_jobs(cluster)
    resubmit(sweep, sweep.runs(), "failed")
    for job in (101, 102):
        options = cluster.options(job)
        assert {option: options[option] for option in DEFAULTS.values()} == {o: f"my_{n}" for n, o in DEFAULTS.items()}
        assert not DEFAULTS.keys() & cluster.environment(job).keys()


def test_the_launchers_setting_beats_the_shells_and_that_is_said(cluster, submit, monkeypatch, capsys):
    monkeypatch.setenv("SBATCH_PARTITION", "short")
    submit("hydra.launcher.partition=main")
    assert cluster.options(101)["partition"] == "main"
    assert "hydra.launcher.* is used instead of SBATCH_PARTITION=short" in capsys.readouterr().out


def test_one_cluster_for_every_command_is_used_and_others_are_refused(cluster, submit, monkeypatch):
    """The queue of another cluster is not asked, so nothing may be sent there."""
    for variables, message in (
        ({"SBATCH_CLUSTERS": "b"}, "export SLURM_CLUSTERS=b"),
        ({"SBATCH_CLUSTERS": "b", "SLURM_CLUSTERS": "a"}, "export SLURM_CLUSTERS=b"),
        ({"SLURM_CLUSTERS": "a,b"}, "several clusters"),
    ):
        with monkeypatch.context() as patched:
            for name, value in variables.items():
                patched.setenv(name, value)
            with pytest.raises(UserError, match=message):
                submit()
        assert cluster.submitted == [], variables
    monkeypatch.setenv("SLURM_CLUSTERS", "a")
    submit()
    assert cluster.environment(101)["SLURM_CLUSTERS"] == "a"


def test_what_setup_brings_back_is_undone_before_srun(cluster, submit, tmp_path):
    """A shell profile exports the variables; a real shell runs the lines of the batch script before srun."""
    profile = tmp_path / "profile"
    profile.write_text("export SLURM_EXPORT_ENV=NONE SRUN_EXPORT_ENV=NONE SLURM_MEM_PER_CPU=100\n")
    submit(f"hydra.launcher.setup=[source {profile}]", seeds=(0,))
    lines = cluster.script(101).partition("# setup")[2].partition("# command")[0]
    show = "\necho $SLURM_EXPORT_ENV,$SRUN_EXPORT_ENV,$SLURM_MEM_PER_CPU,$SLURM_MEM_PER_NODE,$SRUN_CPUS_PER_TASK"
    job = {"SLURM_MEM_PER_NODE": "32768", "SLURM_CPUS_PER_TASK": "8", "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-c", lines + show], env=job, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ALL,,,32768,8"


# ---- options of sbatch -------------------------------------------------------------------------------------------


def test_null_and_false_leave_an_option_out(cluster, submit):
    more = "hydra.launcher.additional_parameters"
    given = [f"+{more}.reservation=null", f"+{more}.hold=false", f"+{more}.nice=100", f"{more}.requeue=null"]
    submit(*given, "hydra.launcher.name=mine")
    options = cluster.options(101)
    assert (options["nice"], options["job-name"]) == ("100", "mine")
    assert not {"reservation", "hold", "requeue"} & options.keys()
