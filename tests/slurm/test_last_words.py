"""Why a job ended, by its log: samples of real logs, and the logs of jobs that the tests submit."""

from __future__ import annotations

import sys
from functools import partial

import pytest

from gsdg.sweep import slurm

STARTED = "submitit INFO (2026-11-22 22:24:57,838) - Starting with JobEnvironment(job_id=78, hostname=vm)\n"
TERM = "submitit WARNING (2026-11-22 22:25:00,691) - Bypassing signal SIGTERM\n"
ENDING = "srun: forcing job termination\nsrun: Job step aborted: Waiting up to 5 seconds for job step to finish.\n"
CANCELLED = "slurmstepd-n3: error: *** STEP 83.0 ON n3 CANCELLED AT 2026-11-22T22:25:00 ***\n"
PREEMPTED = "slurmstepd-n1: error: *** JOB 97 ON n1 CANCELLED AT 2026-11-22T22:27:54 DUE TO PREEMPTION ***\n"
# Logs that SLURM 22.05 wrote: of submitit's jobs and of plain jobs, with and without cgroups.
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


def test_the_end_of_a_job_is_read_from_its_log(tmp_path):
    log = tmp_path / "log"
    for text, reason in LOGS:
        log.write_text(f"{STARTED}working\n{text}")
        assert slurm.termination_reason(log) == reason, text
        log.write_text(f"{STARTED}{text}{STARTED}working\n")
        assert slurm.termination_reason(log) == "", "only the last start of a requeued job counts"


def test_of_a_log_only_the_tail_is_read(tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.write(CANCELLED.encode())
        file.seek(1 << 40)  # a sparse file: no memory could hold it all
        file.write(b"\xff\xfe half a letter\n" + LOGS[6][0].encode())
    assert slurm.termination_reason(log) == "killed by SLURM: time limit"
    log.write_text(CANCELLED + "x" * slurm.TAIL)
    assert slurm.termination_reason(log) == ""
    assert slurm.termination_reason(tmp_path / "absent") == ""


@pytest.mark.slow
def test_the_ends_of_real_jobs_are_read_from_their_logs(cluster):
    work = "echo at work; sleep 600 & wait; wait"
    requeue = f"trap 'scontrol requeue $SLURM_JOB_ID' USR2; {work}"  # as submitit does
    eat = "x=[bytearray(60 << 20) for _ in range(20)]; import time; time.sleep(60)"
    ends = {  # {reason: (node, script, further options of sbatch)}
        "crashed: Segmentation fault": ("n1", "srun bash -c 'kill -SEGV $$'"),
        "ended with exit code 3": ("n1", "srun bash -c 'exit 3'"),
        "killed by SLURM: out of memory": ("n1", f"srun {sys.executable} -c '{eat}'"),
        "killed by SLURM: cancelled": ("n1", f"srun bash -c '{work}'"),
        "killed by SLURM: time limit": ("n1", f"srun bash -c '{work}'"),
        "killed by SLURM: node failure": ("n4", f"srun bash -c '{work}'"),
        "killed by SLURM: preempted": ("n2", work, "--exclusive", "--requeue"),
        "stopped by SLURM: queued again": ("n3", requeue, "--exclusive", "--requeue", "--signal=B:USR2@60"),
    }
    submit = partial(cluster.submit, "--no-requeue", "--mem=300", "--time=5")
    jobs = {
        reason: submit(f"--nodelist={node}", *options, script=script)
        for reason, (node, script, *options) in ends.items()
    }
    logs = {reason: cluster.folder / "log" / f"{job}_4294967294.out" for reason, job in jobs.items()}
    at_work = [log for reason, log in logs.items() if "at work" in ends[reason][1]]
    # A job that SLURM calls RUNNING may not have started yet.
    cluster.wait(lambda: all(log.exists() and "at work" in log.read_text() for log in at_work))
    cluster.run("scontrol", "update", f"jobid={jobs['killed by SLURM: time limit']}", "endtime=now")
    cluster.run("scancel", jobs["killed by SLURM: cancelled"])
    cluster.kill_slurmd_only(4, announced=True)
    for node in ("n2", "n3"):
        cluster.submit("--exclusive", "--partition=high", f"--nodelist={node}")
    for reason, log in logs.items():
        cluster.wait(lambda reason=reason, log=log: slurm.termination_reason(log) == reason, 240)
    assert slurm.queue()[jobs["stopped by SLURM: queued again"]].state == "PENDING"
