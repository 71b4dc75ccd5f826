"""The launcher presets: short differences from submitit's, which every preset of an experiment goes with."""

from __future__ import annotations

import pytest
from helpers import REPOSITORY, SMALL
from omegaconf import OmegaConf

from gsdg.sweep.grid import from_command_line
from gsdg.sweep.task import Task

PRESETS = sorted(
    path.relative_to(REPOSITORY / "conf" / "experiment").with_suffix("").as_posix()
    for path in (REPOSITORY / "conf" / "experiment").rglob("*.yaml")
)


def launcher(*overrides: str) -> dict:
    master = from_command_line(overrides)[2]
    return OmegaConf.to_container(master.hydra.launcher)


@pytest.mark.parametrize("name", ["slurm", "slurm_cpu", "local"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_experiment_goes_with_every_launcher(preset, name):
    jobs, master = from_command_line([f"experiment={preset}", f"hydra/launcher={name}"])[1:]
    kind = "Local" if name == "local" else "Slurm"
    assert master.hydra.launcher._target_ == f"hydra_plugins.gsdg_launchers.{kind}Sweep"
    assert master.hydra.sweeper._target_ == "hydra_plugins.gsdg_sweep.GridSweeper"
    plain = from_command_line([f"experiment={preset}"])[1]
    assert jobs == plain


@pytest.mark.parametrize("name", ["slurm", "slurm_cpu"])
def test_the_presets_survive_preemption_and_the_time_limit(name):
    found = launcher(f"hydra/launcher={name}")
    Task("slurm", found).check()
    assert found["max_num_timeout"] >= 100
    assert found["additional_parameters"]["requeue"] is True
    assert Task("slurm", found).wants_gpu == (name == "slurm")


def test_every_setting_of_submitits_launcher_can_be_overridden():
    found = launcher("hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.account=me",
                     "hydra.launcher.constraint=a100", "hydra.launcher.setup=[module load cuda]",
                     "+hydra.launcher.additional_parameters.reservation=r")  # fmt: skip
    assert (found["partition"], found["account"], found["constraint"]) == ("gpu", "me", "a100")
    assert found["setup"] == ["module load cuda"]
    assert found["additional_parameters"] == {"requeue": True, "reservation": "r"}


@pytest.mark.slow
def test_without_slurm_it_is_a_message_with_what_else_there_is(launch):
    launch.environment["PATH"] = "/nowhere"
    answer = launch("-m", "hydra/launcher=slurm", *SMALL)
    assert answer.returncode == 1
    assert "there is no SLURM here" in answer.stderr
    assert "hydra/launcher=local" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not list(launch.runs_dir.glob(".sweeps/*/runs.jsonl"))


@pytest.mark.slow
def test_a_launcher_without_m_is_refused_because_hydra_would_run_it_here(launch):
    answer = launch("hydra/launcher=slurm", *SMALL)
    assert answer.returncode == 1
    assert "Add -m" in answer.stderr
    assert not launch.runs_dir.exists() or not list(launch.runs_dir.glob("*/status.json"))
