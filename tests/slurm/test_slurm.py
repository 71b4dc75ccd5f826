"""What we ask SLURM, asked of a real one: its queue, cancelling, where nothing can be submitted, its silence."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from desk import Desk
from helpers import REPOSITORY
from lab import Lab

from gsdg.errors import UserError
from gsdg.sweep import slurm
from gsdg.sweep.__main__ import queue
from gsdg.sweep.states import stand

STUBBORN = "trap '' TERM; while :; do sleep 0.2; done"  # outlives SIGTERM until SLURM kills it
HELD = ("--hold", "--array=0-999")
ARRAY = "#!/bin/bash\n#SBATCH --array=0-{}\n"


def running(lab: Lab, *jobs: str) -> None:
    lab.wait(lambda: all(lab.state(job) == "RUNNING" for job in jobs))


# ---- the queue ------------------------------------------------------------------------------------------------------


def test_the_queue_holds_what_waits_and_what_works(cluster, monkeypatch):
    name = "gsdg-2026 a|b-0"
    array = cluster.submit(f"--job-name={name}", "--hold", "--array=0-2")
    plain = cluster.submit("--job-name=gsdg-plain", "--gpus-per-node=1")
    cluster.submit("--job-name=other-gsdg-1", "--hold")
    somebody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    cluster.run(*somebody, "sbatch", "--job-name=gsdg-somebodys", "--hold", "--chdir=/tmp", "--wrap=true")
    running(cluster, plain)
    node = f"n{cluster.node_of(plain)}"
    for variable, value in (("SQUEUE_STATES", "COMPLETED"), ("SQUEUE_FORMAT", "%t"), ("SQUEUE_PARTITION", "high")):
        monkeypatch.setenv(variable, value)  # what some users have in their profile
    found = slurm.queue()
    assert set(found) == {(name, 0), (name, 1), (name, 2), ("gsdg-plain", 0)}
    assert found[name, 2] == slurm.Queued(f"{array}_2", "PENDING", "JobHeldUser", "")
    assert found["gsdg-plain", 0] == slurm.Queued(plain, "RUNNING", "", node)
    assert set(slurm.queue("other-")) == {("other-gsdg-1", 0)}


def test_those_who_share_a_runs_dir_see_one_anothers_tasks(cluster, tmp_path):
    """Whoever owns a sweep's folder has submitted it. One who has left the cluster does not spoil the question."""
    colleague, stranger, gone = 65534, 1, 4242
    sweeps = [Desk(tmp_path / "runs").sweep(["a"], name) for name in ("2026-1", "2026-2")]
    for sweep, uid in zip(sweeps, (colleague, gone), strict=True):
        os.chown(sweep.path, uid, uid)
    array = Desk(tmp_path / "runs").submitted(sweeps[0], [["a"]], jobs=["1"])
    for uid, name in ((colleague, array), (stranger, "gsdg-strangers")):
        held = ("sbatch", f"--job-name={name}", "--hold", "--chdir=/tmp", "--wrap=true")
        cluster.run("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *held)
    found = queue(tmp_path / "runs")
    assert set(found) == {(array, 0)}
    (one,) = stand(sweeps[0].runs(), tmp_path / "runs", found)
    assert (one.state, one.reason) == ("pending", "PENDING (JobHeldUser)")


def test_two_thousand_tasks_are_read_and_cancelled_with_few_commands(cluster, monkeypatch):
    first, second = (cluster.submit(f"--job-name=gsdg-{k}", *HELD) for k in "ab")
    asked, ask = [], slurm._ask
    monkeypatch.setattr(slurm, "_ask", lambda *command: asked.append(command[0]) or ask(*command))
    found = slurm.queue()
    assert len(found) == 2000
    assert found["gsdg-b", 999].job == f"{second}_999"
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
    expected = {(name, index): f"{job}_{index}" for name, (job, spared) in arrays.items() for index in spared}
    found = slurm.queue()
    assert {key: queued.job for key, queued in found.items()} == expected
    assert {queued.state for queued in found.values()} == {"PENDING"}


def test_cancelling_what_is_over_or_was_never_there_is_no_error(cluster):
    over, alive = cluster.submit(script="true"), cluster.submit("--job-name=gsdg-a", "--hold")
    cluster.wait(lambda: cluster.state(over) == "COMPLETED")
    slurm.cancel([])
    unknown = [str(number) for number in range(900000, 900000 + 2 * slurm.PIECES)]
    slurm.cancel([over, *unknown, f"{over}_7", alive, alive])
    assert slurm.queue() == {}


@pytest.mark.slow
def test_a_task_being_cleaned_up_counts_only_if_it_will_start_again(cluster):
    cluster.configure(kill_wait=15)
    again, endless, over = (
        cluster.submit(f"--job-name=gsdg-{name}", f"--time={limit}", script=STUBBORN)
        for name, limit in (("again", 5), ("endless", "UNLIMITED"), ("over", 5))
    )
    running(cluster, again, endless, over)
    cluster.run("scontrol", "requeue", f"{again},{endless}")
    cluster.run("scancel", over)
    cluster.wait(lambda: set(cluster.states().values()) == {"COMPLETING"}, 12)
    assert slurm.queue() == {
        ("gsdg-again", 0): slurm.Queued(again, "PENDING", "queued again", ""),
        ("gsdg-endless", 0): slurm.Queued(endless, "PENDING", "queued again", ""),
    }


def test_the_largest_array_is_as_slurm_says(cluster):
    assert slurm.max_array_size() == 1001
    slurm.test(ARRAY.format(1000))
    with pytest.raises(UserError, match="MaxArraySize"):
        slurm.test(ARRAY.format(1001))


# ---- where nothing can be submitted ---------------------------------------------------------------------------------


def test_without_slurm_the_message_names_the_other_launcher(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"(?s)no SLURM here.*sbatch.*hydra/launcher=local"):
        slurm.refuse_here()
    with pytest.raises(UserError, match="no SLURM here: squeue"):
        slurm.queue()


def test_a_login_node_is_not_refused(cluster, monkeypatch):
    monkeypatch.setenv("SLURM_ACCOUNT", "lab")
    slurm.refuse_here()


@pytest.mark.slow
def test_submitting_inside_a_job_is_refused_and_the_advice_works(cluster, tmp_path):
    program = "from gsdg.sweep import slurm; slurm.refuse_here(); print('may submit')"
    check = f'cd {REPOSITORY} && {sys.executable} -c "{program}"'
    inner = tmp_path / "inner"
    inner.write_text(
        "#!/bin/bash\n#SBATCH --mem=300M\n#SBATCH --array=0-0\nsrun true && echo $SLURM_ARRAY_TASK_ID works\n"
    )
    submit = f"sbatch --output={tmp_path}/%A.inner {inner}"
    steps = [check, f"env -u SLURM_JOB_ID {check.partition('&& ')[2]}", submit, slurm.FORGET, check, submit, "echo end"]
    (tmp_path / "outer").write_text("\n".join(["#!/bin/bash", *steps]))
    cluster.run(
        "sbatch", "--mem-per-cpu=300", "--gpus-per-node=1", f"--output={tmp_path}/said", str(tmp_path / "outer")
    )
    cluster.wait(lambda: (tmp_path / "said").exists() and "end" in (tmp_path / "said").read_text())
    said = (tmp_path / "said").read_text()
    assert said.count("UserError: this is inside") == 2
    assert slurm.FORGET in said
    assert said.count("may submit") == 1
    cluster.wait(lambda: not cluster.states())
    first, second = sorted(tmp_path.glob("*.inner"), key=lambda path: int(path.stem))
    assert "mutually exclusive" in first.read_text()  # what the refusal saves one from
    assert "0 works" in second.read_text()


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "SLURM_JOBID", "SLURM_ARRAY_TASK_ID", "SLURM_STEP_ID"])
def test_any_trace_of_a_job_is_refused(monkeypatch, variable, tmp_path):
    for name in slurm.COMMANDS:
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    slurm.refuse_here()
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UserError, match=variable):
        slurm.refuse_here()


# ---- silence --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_a_controller_it_is_said_and_nothing_is_made_up(cluster):
    job = cluster.submit("--job-name=gsdg-a", "--hold")
    time.sleep(6)  # the controller saves every 5 s what it knows
    cluster.kill_controller()
    questions = {
        "squeue": slurm.queue,
        "scancel": lambda: slurm.cancel([job]),
        "sbatch --test-only": lambda: slurm.test(ARRAY.format(0)),
        "scontrol show config": slurm.max_array_size,
    }
    with ThreadPoolExecutor() as pool:  # each takes 9 to 18 s
        answers = {command: pool.submit(ask) for command, ask in questions.items()}
        explained = pool.submit(slurm.explain, "sbatch: error: Invalid qos specification")
    for command, answer in answers.items():
        with pytest.raises(slurm.SlurmSilent, match=f"(?s)`{command}.*scontrol ping"):
            answer.result()
    assert "hydra.launcher.qos" in explained.result()
    cluster.start_controller()
    assert ("gsdg-a", 0) in slurm.queue()


def test_a_question_does_not_wait_for_ever(monkeypatch, tmp_path):
    (tmp_path / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(slurm, "PATIENCE", 0.3)
    with pytest.raises(slurm.SlurmSilent, match="no answer"):
        slurm.queue()


@pytest.mark.parametrize(
    ("stderr", "kind"),
    [
        ("slurm_load_jobs error: Transport endpoint is not connected", slurm.SlurmSilent),  # seen once
        ("slurm_load_jobs error: Connection refused", slurm.SlurmSilent),
        ("slurm_load_jobs error: Invalid user id", UserError),
    ],
)
def test_a_lost_connection_is_silence_and_a_refusal_is_not(monkeypatch, tmp_path, stderr, kind):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{stderr}' >&2\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError, match=stderr) as error:
        slurm.queue()
    assert type(error.value) is kind
