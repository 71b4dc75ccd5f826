"""Why a job ended, from its log: samples of real logs, and logs of jobs that end here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from lab import Lab

from gsdg.sweep import slurm

STARTED = "submitit INFO (2026-11-22 22:24:57,838) - Starting with JobEnvironment(job_id=78, hostname=vm)\n"
TERM = "submitit WARNING (2026-11-22 22:25:00,691) - Bypassing signal SIGTERM\n"
ENDING = "srun: forcing job termination\nsrun: Job step aborted: Waiting up to 5 seconds for job step to finish.\n"
CANCELLED = "slurmstepd-n3: error: *** STEP 83.0 ON n3 CANCELLED AT 2026-11-22T22:25:00 ***\n"
PREEMPTED = "slurmstepd-n1: error: *** JOB 97 ON n1 CANCELLED AT 2026-11-22T22:27:54 DUE TO PREEMPTION ***\n"
# Logs as this SLURM wrote them: of submitit's jobs, of plain ones, with and without cgroups.
LOGS = [
    (CANCELLED + TERM + ENDING, "killed by SLURM: cancelled"),
    (CANCELLED + TERM + PREEMPTED + ENDING, "killed by SLURM: preempted"),
    ("slurmstepd-n1: error: StepId=78.0 exceeded memory limit (458588160 > 314572800), being killed\n"
     "slurmstepd-n1: error: Exceeded job memory limit\n" + CANCELLED + ENDING + "srun: error: n1: task 0: Killed\n",
     "killed by SLURM: out of memory"),
    ("srun: error: n1: task 0: Out Of Memory\n", "killed by SLURM: out of memory"),
    ("/var/spool/n1/job00002/slurm_script: line 5: 13151 Killed                  python3 -c x\n"
     "slurmstepd-n1: error: Detected 1 oom-kill event(s) in StepId=2.batch. Some of your processes may have "
     "been killed by the cgroup out-of-memory handler.\n", "killed by SLURM: out of memory"),
    ("slurmstepd: error: Detected 1 oom_kill event in StepId=2.0. Some of the step tasks have been OOM Killed.\n",
     "killed by SLURM: out of memory"),
    (ENDING + "slurmstepd-n1: error: *** JOB 4 ON n1 CANCELLED AT 2026-11-22T22:31:25 DUE TO TIME LIMIT ***\n",
     "killed by SLURM: time limit"),
    (TERM + "slurmstepd-n4: error: *** JOB 84 ON n4 CANCELLED AT 2026-11-22T22:25:00 DUE TO JOB REQUEUE ***\n" + ENDING,
     "stopped by SLURM: queued again"),
    ("srun: error: Node failure on n1\n", "killed by SLURM: node failure"),
    ("srun: error: n2: task 0: Killed\nsrun: Force Terminated StepId=80.0\n",
     "killed (signal 9): perhaps the node was out of memory"),
    ("srun: error: n1: task 0: Segmentation fault\n", "crashed: Segmentation fault"),
    ("/var/spool/n1/job00003/slurm_script: line 4: 13294 Segmentation fault      python3 -c x\n",
     "crashed: Segmentation fault"),
    ("srun: error: n3: task 0: Exited with exit code 3\n", "ended with exit code 3"),
    ("srun: fatal: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are mutually exclusive.\n",
     "could not start: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are mutually exclusive."),
    ("step 3: Killed 4 birds; the job was CANCELLED AT noon DUE TO TIME LIMIT, out of memory\n", ""),
    ("", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), LOGS, ids=[words or "nothing" for _, words in LOGS])
def test_the_end_of_a_job_is_read_from_its_log(tmp_path, text, words):
    log = tmp_path / "log"
    log.write_text(f"{STARTED}working\n{text}")
    assert slurm.last_words(log) == words


def test_only_the_last_start_of_a_requeued_job_counts(tmp_path):
    log = tmp_path / "log"
    log.write_text(STARTED + CANCELLED + STARTED + "working\n")
    assert slurm.last_words(log) == ""


def test_of_a_log_only_the_tail_is_read(tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.write(CANCELLED.encode())
        file.seek(1 << 40)  # a sparse file: no memory could hold it all
        file.write(b"\xff\xfe half a letter\n" + LOGS[6][0].encode())
    assert slurm.last_words(log) == "killed by SLURM: time limit"
    log.write_text(CANCELLED + "x" * slurm.TAIL)
    assert slurm.last_words(log) == ""
    assert slurm.last_words(tmp_path / "absent") == ""


WORK = "bash -c 'echo at work; exec sleep 600'"


@pytest.mark.slow
def test_the_ends_of_real_jobs_are_read_from_their_logs(cluster):
    eat = "x=[bytearray(60 << 20) for _ in range(20)]; import time; time.sleep(60)"
    ends = {
        "killed by SLURM: out of memory": ("--exclude=n4", f"srun {sys.executable} -c '{eat}'"),
        "killed by SLURM: cancelled": ("--exclude=n4", f"srun {WORK}"),
        "killed by SLURM: node failure": ("--nodelist=n4", f"srun {WORK}"),
        "killed by SLURM: time limit": ("--exclude=n4", f"srun {WORK}"),
        "crashed: Segmentation fault": ("--exclude=n4", "srun bash -c 'kill -SEGV $$'"),
        "ended with exit code 3": ("--exclude=n4", "srun bash -c 'exit 3'"),
    }
    jobs = {
        words: cluster.submit("--no-requeue", "--mem=300", "--time=1", where, script=text)
        for words, (where, text) in ends.items()
    }
    cancelled, lost = jobs["killed by SLURM: cancelled"], jobs["killed by SLURM: node failure"]
    _at_work(cluster, cancelled, lost, jobs["killed by SLURM: time limit"])
    cluster.run("scancel", cancelled)
    cluster.kill_slurmd_only(4, told=True)
    for words, job in jobs.items():
        cluster.wait(lambda words=words, job=job: slurm.last_words(_log(cluster, job)) == words, 240)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal", "words"),
    [(True, "stopped by SLURM: queued again"), (False, "killed by SLURM: preempted")],
)
def test_both_kinds_of_preemption_can_be_told_from_the_log(cluster, signal, words):
    cluster.configure(user_signal=signal, grace_time=60 if signal else 2)
    stop = "trap 'scontrol requeue $SLURM_JOB_ID' USR2; echo at work; sleep 600 & wait; wait"  # as submitit does
    jobs = [cluster.submit("--exclusive", "--requeue", "--signal=B:USR2@60", script=stop) for _ in range(4)]
    _at_work(cluster, *jobs)
    above = [cluster.submit("--exclusive", "--partition=high") for _ in range(4)]
    cluster.wait(lambda: all(cluster.state(job) == "RUNNING" for job in above))
    for job in jobs:
        assert slurm.last_words(_log(cluster, job)) == words
        assert slurm.queue("wrap")[("wrap", 0)].state in ("PENDING", "RUNNING")


def _at_work(cluster: Lab, *jobs: str) -> None:
    """Until each has said so itself: a job that SLURM calls running may not have begun."""
    logs = [_log(cluster, job) for job in jobs]
    cluster.wait(lambda: all(log.exists() and "at work" in log.read_text() for log in logs))


def _log(cluster: Lab, job: str) -> Path:
    return cluster.folder / "log" / f"{job}_4294967294.out"
