"""Packs, arrays and the checks before a submission; the submissions themselves are in tests/slurm."""

from __future__ import annotations

import pytest

from gsdg.errors import UserError
from gsdg.sweep import slurm
from gsdg.sweep.folder import Frozen, SweepFolder
from gsdg.sweep.freeze import absolute
from gsdg.sweep.job import Pack
from gsdg.sweep.submit import _options, on_gpu, packed, shares, split
from gsdg.sweep.task import Task

GOOD = {
    "tasks_per_node": 1,
    "nodes": 1,
    "runs_per_task": 1,
    "side_by_side": 1,
    "array_parallelism": 64,
    "signal_delay_s": 120,
    "timeout_min": 240,
    "max_num_timeout": 1000,
}
RUNS = [Frozen(str(number), [], {}) for number in range(10)]


@pytest.mark.parametrize(("size", "sizes"), [(1, [1] * 10), (4, [4, 4, 2]), (10, [10]), (None, [10])])
def test_packs_hold_every_run_once_in_order(size, sizes):
    packs = packed(RUNS, {"runs_per_task": size})
    assert [len(pack) for pack in packs] == sizes
    assert [run for pack in packs for run in pack] == RUNS


@pytest.mark.parametrize(("most", "sizes"), [(1001, [10]), (10, [10]), (9, [5, 5]), (3, [2, 3, 2, 3]), (1, [1] * 10)])
def test_arrays_hold_every_pack_once_and_none_is_too_large(monkeypatch, most, sizes):
    monkeypatch.setattr(slurm, "max_array_size", lambda: most)
    arrays = split(packed(RUNS, {"runs_per_task": 1}), Task("slurm", GOOD))
    assert sorted(len(array) for array in arrays) == sorted(sizes)
    assert max(map(len, arrays)) <= most
    assert [pack[0] for array in arrays for pack in array] == RUNS


@pytest.mark.parametrize("parallelism", [3, 7, 64, 100])
def test_arrays_share_what_may_run_at_once(parallelism):
    arrays = [[None] * 5, [None] * 6, [None] * 5]
    given = shares(arrays, parallelism)
    assert sum(given) == parallelism
    assert max(given) - min(given) <= 1 + parallelism // 16


def test_arrays_of_nearly_the_same_size_have_the_same_share():
    assert shares([[None] * 4, [None] * 4, [None] * 5], 6) == [2, 2, 2]


def test_an_array_always_may_run_something():
    assert shares([[None]] * 4, 2) == [1, 1, 1, 1]


def test_the_presets_values_are_fine():
    Task("slurm", GOOD).check()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"signal_delay_s": 600}, "below 600 s"),
        ({"signal_delay_s": 0}, "signal_delay_s=0"),
        ({"timeout_min": 10}, "below 120 s"),
        ({"timeout_min": 12, "signal_delay_s": 660}, "below 144 s"),
        ({"max_num_timeout": 0}, "queued again"),
        ({"nodes": 2}, "one process"),
        ({"tasks_per_node": 4}, "one process"),
        ({"runs_per_task": 0}, "1 or more"),
        ({"side_by_side": 0}, "1 or more"),
        ({"array_parallelism": 0}, "1 or more"),
    ],
    ids=str,
)
def test_what_would_lose_work_is_refused(changed, said):
    with pytest.raises(UserError, match=said):
        Task("slurm", {**GOOD, **changed}).check()


def test_folders_are_frozen_as_seen_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"data_dir": "data", "runs_dir": "/runs", "force": True, "dataset": {"cache": "auto"}}
    frozen = absolute(config)
    assert frozen == {"data_dir": f"{tmp_path}/data", "runs_dir": "/runs", "force": False, "dataset": {"cache": "auto"}}
    given = {**config, "dataset": {"cache": "c"}}
    assert absolute(given)["dataset"]["cache"] == f"{tmp_path}/c"
    assert given["dataset"] == {"cache": "c"}, "what was given is left as it was"


@pytest.mark.parametrize(
    ("parameters", "wants"),
    [({}, False), ({"gpus_per_node": 1}, True), ({"gpus_per_task": 2}, True), ({"gres": "gpu:a100:1"}, True)],
    ids=str,
)
def test_a_task_that_asks_for_a_gpu_is_known(parameters, wants):
    assert Task("slurm", {**GOOD, **parameters}).wants_gpu == wants


@pytest.mark.parametrize(("asked", "frozen"), [("auto", "cuda"), ("cpu", "cpu"), ("cuda:1", "cuda:1")])
def test_what_asked_for_a_gpu_never_falls_back_to_the_cpu(asked, frozen):
    run = Frozen("a", ["x=1"], {"device": asked, "seed": 3})
    assert on_gpu(run) == Frozen("a", ["x=1"], {"device": frozen, "seed": 3})
    assert run.config["device"] == asked


@pytest.mark.parametrize(
    ("visible", "side_by_side", "given"),
    [
        (None, 3, ["GPU-a", "GPU-b", "GPU-a"]),
        (None, 1, [None]),  # its own choice
        ("1,3", 3, ["1", "3", "1"]),
        ("1,3", 1, ["1,3"]),
        ("", 2, ["", ""]),  # hidden on purpose
    ],
)
def test_at_a_desk_with_several_gpus_those_side_by_side_get_one_each(
    tmp_path, monkeypatch, visible, side_by_side, given
):
    """A stand-in for nvidia-smi: there is no such desk here."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU-a\necho GPU-b\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    sweep = SweepFolder(tmp_path / "runs" / ".sweeps" / "s")
    sweep.write({"environment": {}, "overrides": []}, [])
    options = _options(sweep, Task("local", {**GOOD, "side_by_side": side_by_side}), afresh=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as submitit's local jobs have it
    pack = Pack(sweep.path, "gsdg-s-0", "gsdg-s-0", [], **options)
    assert [pack._child_environment(slot).get("CUDA_VISIBLE_DEVICES") for slot in range(side_by_side)] == given
