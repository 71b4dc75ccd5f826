"""Batch scripts that SLURM would refuse are refused before anything is submitted; with a real SLURM."""

from __future__ import annotations

import pytest

from gsdg.sweep import slurm, slurm_messages
from gsdg.utils.errors import UserError


def script(**options: object) -> str:
    lines = [f"#SBATCH --{key.replace('_', '-')}={value}" for key, value in options.items()]
    return "\n".join(["#!/bin/bash", "", "# Parameters", *lines, "", "# command", "sleep 1"])


def refusal(**options: object) -> str:
    """Why SLURM refuses a script with these options; "" if it accepts them."""
    try:
        slurm.check_accepted(script(**options))
    except UserError as error:
        return str(error)
    return ""


def test_a_script_that_slurm_accepts_is_not_refused_and_not_queued(cluster):
    slurm.check_accepted(
        script(array="0-3%2", gpus_per_node=2, mem="3GB", cpus_per_task=2, time=240, signal="USR2@120")
    )
    slurm.check_accepted(script(partition="short", time=30))
    slurm.check_accepted(script(partition="short,main", time=240))
    assert cluster.states() == {}


def test_a_refusal_says_what_was_asked_and_what_there_is(cluster):
    for options, texts in (
        ({"partition": "gpu"}, ["invalid partition specified: gpu", "hydra.launcher.partition", "main (default)"]),
        ({"gpus_per_node": 3}, ["gpus-per-node=3", "gpus_per_node", "gpu:2"]),
        ({"gres": "gpu:3"}, ["gres=gpu:3", "gpu:2"]),
        ({"gres": "gpu:a100:1"}, ["gpu:2"]),
        ({"gres": "tpu:1"}, ["gres=tpu:1", "gpu:2"]),
        ({"mem": "64GB"}, ["mem=64GB", "mem_gb", "8000 MB"]),
        ({"cpus_per_task": 16}, ["cpus-per-task=16", "cpus_per_task", "CPUs"]),
        ({"nodes": 2, "partition": "short"}, ["nodes=2", "nodes"]),
        ({"partition": "short", "time": 31}, ["31 minutes", "timeout_min", "30 min", "never start"]),
        ({"constraint": "a100"}, ["constraint=a100", "hydra.launcher.constraint", "pretend"]),
        ({"exclude": "n77"}, ["Invalid node name", "sinfo -N"]),
        ({"reservation": "mine"}, ["reservation is invalid"]),
        ({"gpu_per_node": 1}, ["unrecognized option '--gpu-per-node=1'", "additional_parameters"]),
        ({"time": "long"}, ["Invalid --time", "time=long"]),
        # The next three are refused earlier, with the override to add (tests/sweep/test_submit.py).
        ({"mem": "1GB", "mem_per_cpu": "1G"}, ["mutually exclusive"]),
        ({"requeue": "False"}, ["doesn't allow an argument"]),
        ({"reservation": "None"}, ["reservation is invalid"]),
    ):
        message = refusal(**options)
        for text in texts:
            assert text in message, options
        assert "sbatch:" not in message, options
    assert cluster.states() == {}


TOO_MUCH = (
    {"gpus_per_node": 3},
    {"gpus_per_task": 2, "ntasks_per_node": 2},
    {"cpus_per_task": 3},
    {"cpus_per_task": 2, "ntasks_per_node": 2},
    {"mem": "9GB"},
    {"mem_per_cpu": "5GB", "cpus_per_task": 2},
    {"mem_per_gpu": "5GB", "gpus_per_node": 2},
    {"nodes": 5},
    {"nodes": 2, "partition": "short"},
)


def test_jobs_may_wait_for_nodes_that_are_away_but_not_for_nodes_that_are_not_there(cluster, caplog):
    for submitted, state in enumerate(("drain", "down")):
        caplog.clear()
        cluster.run("scontrol", "update", "nodename=n[1-4]", f"state={state}", "reason=test")
        slurm.check_accepted(script(gpus_per_node=2, mem="3GB", cpus_per_task=2))
        assert "they will wait" in caplog.text
        cluster.submit("--job-name=gsdg-a", "--gpus-per-node=2")  # a real submission agrees
        assert len(slurm.queue()) == submitted + 1
        for too_much in TOO_MUCH:
            assert "No node has all of this" in refusal(**too_much), (state, too_much)


def test_the_table_is_of_nodes_whatever_their_state_and_only_where_it_helps(cluster):
    cluster.run("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    rows = [line.split() for line in refusal(gpus_per_node=3).splitlines() if line.startswith("  main")]
    assert rows == [["main", "(default)", "none", "2", "8000", "MB", "gpu:2", "pretend", "4"]]
    message = refusal(array="0-1001")
    assert "MaxArraySize" in message
    assert "What there is" not in message


def test_a_closed_partition_is_named(cluster):
    cluster.run("scontrol", "update", "partition=short", "state=inactive")
    try:
        with pytest.raises(UserError, match=r"(?s)Closed.*short \(closed\)"):
            slurm.check_accepted(script(partition="short"))
    finally:
        cluster.run("scontrol", "update", "partition=short", "state=up")


# sbatch's own words, from a cluster with accounts (slurmdbd) and limits; the tests' cluster has none.
POLICY = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
FAILED = "sbatch: error: Batch job submission failed"


LIMITS = (
    (f"sbatch: error: QOSMaxSubmitJobPerUserLimit\n{FAILED}: {POLICY}", "runs_per_task"),
    (f"sbatch: error: AssocMaxSubmitJobLimit\n{FAILED}: {POLICY}", "each task of an array counts"),
    (f"sbatch: error: AssocGrpSubmitJobsLimit\nallocation failure: {POLICY}", "each task of an array counts"),
    (f"sbatch: error: QOSMaxGRESPerUser\nallocation failure: {POLICY}", "limit of your account or QOS"),
    (f"sbatch: error: QOSMaxWallDurationPerJobLimit\nallocation failure: {POLICY}", "timeout_min"),
    ("allocation failure: Invalid account or account/partition combination specified", "hydra.launcher.account"),
    ("allocation failure: Invalid qos specification", "hydra.launcher.qos"),
    ("sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying\n"
     "sbatch: error: Batch job submission failed: Resource temporarily unavailable", "MaxJobCount"),
    ("Traceback (most recent call last):\n  File x\nsomething else", "SLURM refuses the jobs: something else"),
    ("", "no reason given"),
)  # fmt: skip


def test_a_limit_of_the_account_is_explained(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # no SLURM here, so the message has no table
    for stderr, meaning in LIMITS:
        message = slurm.explain_refusal(stderr)
        assert meaning in message, stderr
        assert stderr.rpartition("\n")[2].rpartition(": ")[2] in message, stderr
        assert "What there is" not in message, stderr
        assert slurm.explain_refusal(f"{stderr}\n{stderr}") == message, f"{stderr} is repeated"


def test_the_real_refusal_is_explained_with_what_there_is(cluster):
    with pytest.raises(RuntimeError) as error:
        cluster.submit("--partition=gpu")
    assert "main (default)" in slurm.explain_refusal(str(error.value))


# ---- how SLURM writes values ---------------------------------------------------------------------------------------


def test_times_are_read_in_minutes():
    minutes = {"90": 90, "30:00": 30, "1:30:00": 90, "1-0": 1440, "1-12:30": 2190, "2-00:00:30": 2880.5}
    for text, value in {**minutes, "infinite": None, "UNLIMITED": None, "n/a": None, "": None}.items():
        assert slurm_messages.minutes(text) == value, text


def test_memory_is_read_in_megabytes():
    for text, value in {"32GB": 32768, "300M": 300, "4000": 4000, "1.5G": 1536, "2T": 2**21}.items():
        assert slurm_messages.megabytes(text) == value, text


def test_the_gpus_of_a_node_are_counted():
    counts = {"gpu:2": 2, "gpu:a100:4(S:0-1),gpu:v100:2": 6, "(null)": 0, "shard:8": 0, "gpu:nvidia_a100-sxm4:8": 8}
    for gres, count in counts.items():
        assert slurm_messages.gpus(gres) == count, gres


def test_a_node_is_up_if_it_will_take_jobs():
    for state in ("idle", "plnd", "mix-", "idle*", "drain", "down*"):
        group = slurm_messages.NodeGroup.of("main*", "up", "infinite", "4", "2", "4000", "gpu:2", "pretend", state)
        assert group.up == (state in ("idle", "plnd", "mix-")), state
