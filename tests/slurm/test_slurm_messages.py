"""What SLURM would refuse, said before anything is submitted: asked of a real one."""

from __future__ import annotations

import pytest

from gsdg.errors import UserError
from gsdg.sweep import refusals, slurm


def script(**options: object) -> str:
    lines = [f"#SBATCH --{key.replace('_', '-')}={value}" for key, value in options.items()]
    return "\n".join(["#!/bin/bash", "", "# Parameters", *lines, "", "# command", "sleep 1"])


def test_what_slurm_takes_is_not_refused_and_not_queued(cluster):
    slurm.test(script(array="0-3%2", gpus_per_node=2, mem="3GB", cpus_per_task=2, time=240, signal="USR2@120"))
    slurm.test(script(partition="short", time=30))
    slurm.test(script(partition="short,main", time=240))
    assert cluster.states() == {}


@pytest.mark.parametrize(
    ("options", "valid"),
    [
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
    ],
    ids=str,
)  # fmt: skip
def test_a_refusal_says_what_was_asked_and_what_there_is(cluster, options, valid):
    with pytest.raises(UserError) as error:
        slurm.test(script(**options))
    for text in valid:
        assert text in str(error.value)
    assert "sbatch:" not in str(error.value)
    assert cluster.states() == {}


def test_a_partition_in_the_environment_counts_as_with_sbatch(cluster, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "short")
    with pytest.raises(UserError, match="partition=short, time=31"):
        slurm.test(script(partition="main", time=31))


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


@pytest.mark.parametrize("state", ["drain", "down"])
def test_jobs_may_wait_for_nodes_that_are_away_but_not_for_nodes_that_are_not_there(cluster, state, caplog):
    cluster.run("scontrol", "update", "nodename=n[1-4]", f"state={state}", "reason=test")
    slurm.test(script(gpus_per_node=2, mem="3GB", cpus_per_task=2))
    assert "they will wait" in caplog.text
    cluster.submit("--job-name=gsdg-a", "--gpus-per-node=2")  # a real submission agrees
    assert len(slurm.queue()) == 1
    for too_much in TOO_MUCH:
        with pytest.raises(UserError, match="No node has all of this"):
            slurm.test(script(**too_much))


def test_the_table_is_of_nodes_whatever_their_state_and_only_where_it_helps(cluster):
    cluster.run("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    with pytest.raises(UserError) as error:
        slurm.test(script(gpus_per_node=3))
    rows = [line.split() for line in str(error.value).splitlines() if line.startswith("  main")]
    assert rows == [["main", "(default)", "none", "2", "8000", "MB", "gpu:2", "pretend", "4"]]
    with pytest.raises(UserError) as error:
        slurm.test(script(array="0-1001"))
    assert "What there is" not in str(error.value)


def test_a_closed_partition_is_named(cluster):
    cluster.run("scontrol", "update", "partition=short", "state=inactive")
    try:
        with pytest.raises(UserError, match=r"(?s)Closed.*short \(closed\)"):
            slurm.test(script(partition="short"))
    finally:
        cluster.run("scontrol", "update", "partition=short", "state=up")


@pytest.mark.slow
def test_a_full_queue_is_said_before_anything_is_submitted(cluster):
    cluster.configure(max_jobs=20)
    with pytest.raises(UserError, match="MaxJobCount"):
        slurm.test(script(array="0-40"))


# sbatch's own words, from a cluster with accounts (slurmdbd) and limits; the tests' cluster has none.
POLICY = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
FAILED = "sbatch: error: Batch job submission failed"


@pytest.mark.parametrize(
    ("stderr", "meaning"),
    [
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
    ],
)  # fmt: skip
def test_a_limit_of_the_account_is_explained(monkeypatch, stderr, meaning):
    monkeypatch.setenv("PATH", "/nowhere")  # no SLURM to ask: the explanation goes without the table
    said = slurm.explain(stderr)
    assert meaning in said
    assert stderr.splitlines()[-1:] == [] or stderr.splitlines()[-1].split(": ")[-1] in said
    assert "What there is" not in said
    assert slurm.explain(f"{stderr}\n{stderr}") == said, "said once"


def test_the_real_refusal_is_explained_with_what_there_is(cluster):
    with pytest.raises(RuntimeError) as error:
        cluster.submit("--partition=gpu")
    assert "main (default)" in slurm.explain(str(error.value))


@pytest.mark.parametrize(
    ("text", "value"),
    [("90", 90), ("30:00", 30), ("1:30:00", 90), ("1-0", 1440), ("1-12:30", 2190), ("2-00:00:30", 2880.5),
     ("infinite", None), ("UNLIMITED", None), ("n/a", None), ("", None)],
)  # fmt: skip
def test_slurms_times_are_understood(text, value):
    assert refusals.minutes(text) == value


@pytest.mark.parametrize(
    ("state", "up"),
    [("idle", True), ("plnd", True), ("mix-", True), ("idle*", False), ("drain", False), ("down*", False)],
)
def test_a_node_is_up_if_it_will_take_jobs(state, up):
    assert refusals.Nodes.of("main*", "up", "infinite", "4", "2", "4000", "gpu:2", "pretend", state).up == up


@pytest.mark.parametrize(
    ("gres", "count"),
    [("gpu:2", 2), ("gpu:a100:4(S:0-1),gpu:v100:2", 6), ("(null)", 0), ("shard:8", 0), ("gpu:nvidia_a100-sxm4:8", 8)],
)  # fmt: skip
def test_gpus_of_a_node_are_counted(gres, count):
    assert refusals.gpus(gres) == count


@pytest.mark.parametrize(
    ("text", "megabytes"), [("32GB", 32768), ("300M", 300), ("4000", 4000), ("1.5G", 1536), ("2T", 2**21)]
)
def test_slurms_memory_is_understood(text, megabytes):
    assert refusals.megabytes(text) == megabytes
