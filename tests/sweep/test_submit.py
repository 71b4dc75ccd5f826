"""Packs, arrays and the checks before a submission; the submissions themselves are in tests/slurm."""

from __future__ import annotations

import re
from pathlib import Path

from gsdg.sweep import slurm
from gsdg.sweep.executor import Task
from gsdg.sweep.folder import FrozenRun, SweepFolder
from gsdg.sweep.submit import _pack_options, check_place, divide_parallelism, pack_runs, require_gpu, split_into_arrays
from gsdg.sweep.task_process import Pack

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
RUNS = [FrozenRun(str(number), [], {}) for number in range(10)]


def check(cluster: str = "slurm", **changed: object) -> None:
    """Check the good parameters with these changes."""
    Task(cluster, {**GOOD, **changed}).check()


def test_packs_hold_every_run_once_in_order():
    for size, sizes in {1: [1] * 10, 4: [4, 4, 2], 10: [10], None: [10]}.items():
        packs = pack_runs(RUNS, {"runs_per_task": size})
        assert [len(pack) for pack in packs] == sizes
        assert [run for pack in packs for run in pack] == RUNS


def test_arrays_hold_every_pack_once_and_none_is_too_large(monkeypatch):
    for most, sizes in {1001: [10], 10: [10], 9: [5, 5], 3: [2, 2, 3, 3], 1: [1] * 10}.items():
        monkeypatch.setattr(slurm, "max_array_size", lambda most=most: most)
        arrays = split_into_arrays(pack_runs(RUNS, {"runs_per_task": 1}), Task("slurm", GOOD))
        assert sorted(len(array) for array in arrays) == sizes
        assert [pack[0] for array in arrays for pack in array] == RUNS


def test_arrays_share_what_may_run_at_once_by_their_sizes_and_each_may_run_something():
    arrays = [[None] * 5, [None] * 6, [None] * 5]
    for parallelism in (3, 7, 64, 100):
        shares = divide_parallelism(arrays, parallelism)
        assert sum(shares) == parallelism
        assert max(shares) - min(shares) <= 1 + parallelism // 16
    assert divide_parallelism([[None] * 4, [None] * 4, [None] * 5], 6) == [2, 2, 2]
    assert divide_parallelism([[None]] * 4, 2) == [1, 1, 1, 1]


# ---- settings of the launcher ------------------------------------------------------------------------------------


def test_settings_that_would_lose_work_are_refused(refusal):
    check()
    for changed, message in (
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
    ):
        assert message in refusal(check, **changed), changed


def test_settings_that_contradict_one_another_are_refused_with_the_override_that_works(refusal):
    for changed, message in (
        ({"mem_gb": 32, "mem_per_cpu": "4G"}, "mem_gb=32 and .*mem_per_cpu=4G.*\n.*add: hydra.launcher.mem_gb=null"),
        ({"mem_gb": 32, "mem_per_gpu": "40G"}, "add: hydra.launcher.mem_gb=null"),
        ({"cpus_per_task": 8, "cpus_per_gpu": 4}, "add: hydra.launcher.cpus_per_task=null"),
        ({"gpus_per_node": 1, "gres": "gpu:a100:1"}, "add: hydra.launcher.gpus_per_node=null"),
        ({"gpus_per_node": 1, "gpus_per_task": 1}, "add: hydra.launcher.gpus_per_node=null"),
        ({"gpus_per_node": 1, "additional_parameters": {"gpus": 1}}, "add: hydra.launcher.gpus_per_node=null"),
        ({"submitit_folder": "logs"}, r"submitit_folder=logs: .*<sweep>/jobs\.\nLeave it out"),
    ):
        assert re.search(f"(?s){message}", refusal(check, **changed)), changed
    check(mem_gb=None, mem_per_cpu="4G", cpus_per_gpu=4, gres="gpu:a100:1,tmp:1", gpus_per_node=0)


def test_options_of_sbatch_that_a_sweep_cannot_have_are_refused(refusal):
    for option, value, message in (
        ("requeue", False, "additional_parameters.requeue=null"),
        ("no_requeue", True, "would not come back"),
        ("job_name", "a", "use hydra.launcher.name=... instead"),
        ("job-name", "a", "use hydra.launcher.name=... instead"),
        ("job-n", "a", "use hydra.launcher.name=... instead"),
        ("time", 5, "use hydra.launcher.timeout_min"),
        ("tim", 5, "use hydra.launcher.timeout_min"),
        ("mem", "4G", "use hydra.launcher.mem_gb"),
        ("gres", "gpu:1", "use hydra.launcher.gres"),
        ("export", "NONE", "variables of the shell"),
        ("clusters", "b", "SLURM_CLUSTERS"),
        ("array", "0-3", "runs_per_task"),
        ("output", "x", "<sweep>/jobs"),
        ("parsable", True, "answer is read"),
        ("wait", True, "--watch"),
    ):
        text = refusal(check, additional_parameters={option: value})
        assert message in text, option
        assert f"hydra.launcher.additional_parameters.{option}=" in text
    allowed = {"J": "a", "reservation": "mine", "requeue": True, "hold": True, "gpus": "a100:1", "exclusive": True}
    allowed |= {"nodelist": "n1", "dependency": "afterok:1", "mail-type": "END", "licenses": "a", "tmp": "10G"}
    for options in (allowed, {"requeue": None, "chdir": "/tmp"}):
        check(additional_parameters=options)


def test_settings_that_a_sweep_on_this_machine_does_not_use_are_refused(refusal):
    for name in ("name", "cpus_per_task", "mem_gb"):
        check("local", **{name: None})
        assert f"{name}=3 has no effect with hydra/launcher=local" in refusal(check, "local", **{name: 3})


def test_a_runs_dir_that_sbatch_would_rename_or_that_is_not_the_sweeps_is_refused(tmp_path, refusal):
    for runs_dir in ("/tmp/%j/runs", "/tmp/100%"):
        sweep = SweepFolder(Path(runs_dir) / ".sweeps" / "s")
        text = refusal(check_place, sweep, [FrozenRun("a", [], {"runs_dir": runs_dir})])
        assert "Choose a runs_dir without %" in text, runs_dir
    sweep = SweepFolder(tmp_path / "runs" / ".sweeps" / "s")
    runs = [FrozenRun("a", [], {"runs_dir": str(place)}) for place in (tmp_path / "runs", tmp_path / "other")]
    check_place(sweep, runs[:1])
    assert f"the runs are under {tmp_path / 'other'}" in refusal(check_place, sweep, runs)


# ---- GPUs --------------------------------------------------------------------------------------------------------


def test_a_task_that_asks_for_a_gpu_is_recognised():
    asking = [{"gpus_per_node": 1}, {"gpus_per_node": "a100:1"}, {"gpus_per_task": 2}, {"gres": "gpu:a100:1"}]
    for parameters in (*asking, {"additional_parameters": {"gpus": 1}}):
        assert Task("slurm", {**GOOD, **parameters}).wants_gpu, parameters
    for parameters in ({}, {"gres": "tmp:1"}):
        assert not Task("slurm", {**GOOD, **parameters}).wants_gpu, parameters


def test_a_run_that_asked_for_a_gpu_never_falls_back_to_the_cpu():
    for asked, frozen in {"auto": "cuda", "cpu": "cpu", "cuda:1": "cuda:1"}.items():
        run = FrozenRun("a", ["x=1"], {"device": asked, "seed": 3})
        assert require_gpu(run) == FrozenRun("a", ["x=1"], {"device": frozen, "seed": 3})
        assert run.config["device"] == asked


def test_on_a_machine_with_several_gpus_runs_side_by_side_get_one_each(tmp_path, monkeypatch):
    """With a stand-in for nvidia-smi, because this machine does not have several GPUs."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU-a\necho GPU-b\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    sweep = SweepFolder(tmp_path / "runs" / ".sweeps" / "s")
    sweep.write({"environment": {}, "overrides": []}, [])
    for visible, side_by_side, expected in (
        (None, 3, ["GPU-a", "GPU-b", "GPU-a"]),
        (None, 1, [None]),  # unchanged
        ("1,3", 3, ["1", "3", "1"]),
        ("1,3", 1, ["1,3"]),
        ("", 2, ["", ""]),  # hidden on purpose
    ):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        options = _pack_options(sweep, Task("local", {**GOOD, "side_by_side": side_by_side}), from_scratch=False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as submitit's local jobs have it
        pack = Pack(sweep.path, "gsdg-s-0", "gsdg-s-0", [], **options)
        gpus = [pack._child_environment(slot).get("CUDA_VISIBLE_DEVICES") for slot in range(side_by_side)]
        assert gpus == expected, (visible, side_by_side)
