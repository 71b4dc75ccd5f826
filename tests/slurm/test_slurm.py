"""gsdg.sweep.slurm with a real SLURM: the queue, cancelling, where nothing can be submitted, no answer."""

from __future__ import annotations

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from desk import Desk, script
from helpers import REPOSITORY
from lab import Lab

from gsdg.sweep import slurm
from gsdg.sweep.__main__ import queue
from gsdg.sweep.run_states import run_states
from gsdg.utils.errors import UserError

HELD = ("--hold", "--array=0-999")
ARRAY = "#!/bin/bash\n#SBATCH --array=0-{}\n"


def running(lab: Lab, *jobs: str) -> None:
    lab.wait(lambda: all(lab.state(job) == "RUNNING" for job in jobs))


# ---- the queue ------------------------------------------------------------------------------------------------------


def test_the_queue_holds_what_waits_and_what_works(cluster, tmp_path, monkeypatch):
    name = "gsdg-2026 a|b-0"
    array = cluster.submit(f"--job-name={name}", "--hold", "--array=0-2")
    plain = cluster.submit("--job-name=gsdg-plain", "--gpus-per-node=1")
    other = cluster.submit("--job-name=other-gsdg-1", "--hold")
    somebody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    cluster.run(*somebody, "sbatch", "--job-name=gsdg-somebodys", "--hold", "--chdir=/tmp", "--wrap=true")
    running(cluster, plain)
    node = f"n{cluster.node_of(plain)}"
    for variable, value in (("SQUEUE_STATES", "COMPLETED"), ("SQUEUE_FORMAT", "%t"), ("SQUEUE_PARTITION", "high")):
        monkeypatch.setenv(variable, value)  # what some users have in their profile
    script = tmp_path / ".submission file.sh"
    script.write_text("#!/bin/bash\nsleep 60\n")
    scripted = cluster.run("sbatch", "--parsable", "--hold", "--output=/dev/null", str(script)).strip()
    found = slurm.queue()
    assert set(found) == {f"{array}_0", f"{array}_1", f"{array}_2", plain, other, scripted}
    assert found[f"{array}_2"] == slurm.QueuedTask(f"{array}_2", "PENDING", "JobHeldUser", "")
    assert found[f"{array}_2"].index == 2
    assert found[plain] == slurm.QueuedTask(plain, "RUNNING", "", node)
    assert found[scripted] == slurm.QueuedTask(scripted, "PENDING", "JobHeldUser", "", str(script))


def test_those_who_share_a_runs_dir_see_one_anothers_tasks(cluster):
    """The owner of a sweep's folder has submitted it. squeue must not fail for a user who has left the cluster."""
    colleague, stranger, gone = 65534, 1, 4242
    desk = Desk(cluster.folder / "shared" / "runs")  # other users can read it
    sweeps = [desk.sweep(["a"], name) for name in ("2026-1", "2026-2")]
    for sweep, uid in zip(sweeps, (colleague, gone), strict=True):
        os.chown(sweep.path, uid, uid)
    array = desk.submitted(sweeps[0], [["a"]])  # the number was never noted
    jobs = {}
    for uid in (colleague, stranger):
        held = ("sbatch", "--parsable", "--job-name=mine", "--hold", "--chdir=/tmp", str(script(sweeps[0], array)))
        jobs[uid] = cluster.run("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *held).strip()
    found = queue(desk.runs_dir)
    assert set(found) == {jobs[colleague]}
    (one,) = run_states(sweeps[0].runs(), desk.runs_dir, found)
    assert (one.state, one.reason, one.job) == ("pending", "PENDING (JobHeldUser)", jobs[colleague])


def test_two_thousand_tasks_are_read_and_cancelled_with_few_commands(cluster, monkeypatch):
    first, second = (cluster.submit(f"--job-name=gsdg-{k}", *HELD) for k in "ab")
    asked, ask = [], slurm._run_command
    monkeypatch.setattr(slurm, "_run_command", lambda *command: asked.append(command[0]) or ask(*command))
    found = slurm.queue()
    assert len(found) == 2000
    assert found[f"{second}_999"].job == f"{second}_999"
    spared = {f"{first}_0", f"{first}_500", f"{second}_999"}
    slurm.cancel([queued.job for queued in found.values() if queued.job not in spared])
    assert asked == ["squeue", "squeue", "scancel"]
    assert {queued.job for queued in slurm.queue().values()} == spared


def test_exactly_the_others_are_cancelled_and_every_one_of_the_rest_is_seen(cluster):
    kept = [range(0, 300, 2), range(3, 30, 4), [298], [0, 299], [*range(0, 300, 2), 101], range(100)]
    arrays = {}
    for number, indices in enumerate(kept * 2):
        tasks = "--array=0-299%4" if number < len(kept) else "--array=0-299"
        arrays[f"gsdg-{number}"] = cluster.submit(f"--job-name=gsdg-{number}", "--hold", tasks), set(indices)
    slurm.cancel([f"{job}_{index}" for job, spared in arrays.values() for index in set(range(300)) - spared])
    expected = {f"{job}_{index}" for job, spared in arrays.values() for index in spared}
    found = slurm.queue()
    assert set(found) == expected
    assert all(job == queued.job for job, queued in found.items())
    assert {queued.state for queued in found.values()} == {"PENDING"}


def test_cancelling_what_is_over_or_was_never_there_is_no_error(cluster):
    over, alive = cluster.submit(script="true"), cluster.submit("--job-name=gsdg-a", "--hold")
    cluster.wait(lambda: cluster.state(over) == "COMPLETED")
    slurm.cancel([])
    unknown = [str(number) for number in range(900000, 900000 + 2 * slurm.MAX_ARGUMENTS)]
    slurm.cancel([over, *unknown, f"{over}_7", alive, alive])
    assert slurm.queue() == {}


@pytest.mark.slow
def test_a_task_being_cleaned_up_counts_only_if_it_will_start_again(cluster, tmp_path):
    cluster.configure(kill_wait=15)
    stubborn = f"echo $$ >> {tmp_path}/pids; trap '' TERM; while :; do sleep 0.2; done"  # outlives SIGTERM
    again, endless, over = (
        cluster.submit(f"--job-name=gsdg-{name}", f"--time={limit}", script=stubborn)
        for name, limit in (("again", 5), ("endless", "UNLIMITED"), ("over", 5))
    )
    pids = cluster.wait(lambda: len(pids := numbers(tmp_path / "pids")) == 3 and pids)
    cluster.run("scontrol", "requeue", f"{again},{endless}")
    cluster.run("scancel", over)
    cluster.wait(lambda: set(cluster.states().values()) == {"COMPLETING"}, 12)
    assert slurm.queue() == {
        again: slurm.QueuedTask(again, "PENDING", "queued again", ""),
        endless: slurm.QueuedTask(endless, "PENDING", "queued again", ""),
    }
    for pid in pids:  # SLURM would do it after kill_wait
        os.kill(pid, signal.SIGKILL)


def numbers(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_the_largest_array_is_as_slurm_says(cluster):
    assert slurm.max_array_size() == 1001
    slurm.check_accepted(ARRAY.format(1000))
    with pytest.raises(UserError, match="MaxArraySize"):
        slurm.check_accepted(ARRAY.format(1001))


# ---- where nothing can be submitted ---------------------------------------------------------------------------------


def test_nothing_can_be_submitted_without_slurm_or_from_inside_a_job(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"(?s)no SLURM here.*sbatch.*hydra/launcher=local"):
        slurm.check_can_submit()
    with pytest.raises(UserError, match="no SLURM here: squeue"):
        slurm.queue()
    for name in slurm.COMMANDS:
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("SLURM_ACCOUNT", "lab")  # as on a login node
    slurm.check_can_submit()
    for variable in ("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_ARRAY_TASK_ID", "SLURM_STEP_ID"):
        monkeypatch.setenv(variable, "1")
        with pytest.raises(UserError, match=variable):
            slurm.check_can_submit()
        monkeypatch.delenv(variable)


@pytest.mark.slow
def test_submitting_inside_a_job_is_refused_and_the_advice_works(cluster, tmp_path):
    program = "from gsdg.sweep import slurm; slurm.check_can_submit(); print('may submit')"
    check = f'cd {REPOSITORY} && {sys.executable} -c "{program}"'
    inner = tmp_path / "inner"
    options = "#SBATCH --mem=300M\n#SBATCH --array=0-0"
    inner.write_text(f"#!/bin/bash\n{options}\nsrun true && echo $SLURM_ARRAY_TASK_ID works\n")
    submit = f"sbatch --output={tmp_path}/%A.inner {inner}"
    without_number = f"env -u SLURM_JOB_ID {check.partition('&& ')[2]}"
    steps = [check, without_number, submit, slurm.UNSET_JOB_VARIABLES, check, submit, "echo end"]
    outer, output = tmp_path / "outer", tmp_path / "output"
    outer.write_text("\n".join(["#!/bin/bash", *steps]))
    cluster.run("sbatch", "--mem-per-cpu=300", "--gpus-per-node=1", f"--output={output}", str(outer))
    cluster.wait(lambda: output.exists() and "end" in output.read_text())
    text = output.read_text()
    assert text.count("UserError: this is inside") == 2
    assert slurm.UNSET_JOB_VARIABLES in text
    assert text.count("may submit") == 1
    cluster.wait(lambda: not cluster.states())
    first, second = sorted(tmp_path.glob("*.inner"), key=lambda path: int(path.stem))
    assert "mutually exclusive" in first.read_text()  # the error that the refusal prevents
    assert "0 works" in second.read_text()


# ---- silence --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_a_controller_every_command_says_so(cluster):
    job = cluster.submit("--job-name=gsdg-a", "--hold")
    cluster.kill_controller(signal.SIGTERM)  # which lets it save its state
    questions = {
        "squeue": slurm.queue,
        "scancel": lambda: slurm.cancel([job]),
        "sbatch --test-only": lambda: slurm.check_accepted(ARRAY.format(0)),
        "scontrol show config": slurm.max_array_size,
    }
    with ThreadPoolExecutor() as pool:  # each takes 9 to 18 s
        answers = {command: pool.submit(ask) for command, ask in questions.items()}
        explained = pool.submit(slurm.explain_refusal, "sbatch: error: Invalid qos specification")
    for command, answer in answers.items():
        with pytest.raises(slurm.SlurmNotResponding, match=f"(?s)`{command}.*scontrol ping"):
            answer.result()
    assert "hydra.launcher.qos" in explained.result()
    cluster.start_controller()
    assert job in slurm.queue()


@pytest.fixture
def squeue(monkeypatch, tmp_path):
    """A function that puts a shell script in the place of squeue."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def squeue(script: str) -> None:
        (tmp_path / "squeue").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "squeue").chmod(0o755)

    return squeue


def test_a_task_being_cleaned_up_is_judged_by_slurms_clock_alone(squeue, tmp_path):
    """Lines of a real squeue: over after 25 s, over at once; requeued with a limit of 1 minute, and without."""
    for ahead in (-3600, -60, 0, 60, 3600):
        now = int(time.time()) + ahead
        ends = [(now - 30, now - 5, "0:25"), (now, now, "0:00"), (now, now + 60, "0:00"), (now, "NONE", "0:00")]
        tasks = [(job, "COMPLETING", "None", "n1", "/s.sh", *end) for job, end in enumerate(ends, 1)]
        lines = ["CLUSTER: lab", *("\x1f".join(map(str, task)) for task in tasks)]
        (tmp_path / "answer").write_text("\n".join(lines) + "\n")
        squeue(f"cat {tmp_path}/answer")
        expected = {job: slurm.QueuedTask(job, "PENDING", "queued again", "", "/s.sh") for job in "34"}
        assert slurm.queue() == expected, ahead


def test_a_question_does_not_wait_for_ever(squeue, monkeypatch):
    squeue("exec sleep 60")
    monkeypatch.setattr(slurm, "PATIENCE", 0.3)
    with pytest.raises(slurm.SlurmNotResponding, match="no answer"):
        slurm.queue()


def test_a_lost_connection_is_no_answer_and_a_refusal_is_one(squeue):
    for reason, kind in (
        ("Transport endpoint is not connected", slurm.SlurmNotResponding),  # seen once
        ("Connection refused", slurm.SlurmNotResponding),
        ("Invalid user id", UserError),
    ):
        squeue(f"echo 'slurm_load_jobs error: {reason}' >&2\nexit 1")
        with pytest.raises(UserError, match=f"slurm_load_jobs error: {reason}") as error:
            slurm.queue()
        assert type(error.value) is kind, reason
