"""The launcher presets: few differences from submitit's defaults; every experiment preset works with them."""

from __future__ import annotations

from itertools import cycle

import pytest
from config_choices import PRESETS
from helpers import SMALL
from omegaconf import OmegaConf

from gsdg.sweep.compose import from_command_line
from gsdg.sweep.executor import Task


def launcher(*overrides: str) -> dict:
    master = from_command_line(overrides)[2]
    return OmegaConf.to_container(master.hydra.launcher)


def test_every_experiment_works_with_a_launcher():
    for preset, name in zip(PRESETS, cycle(["local", "slurm", "slurm_cpu"])):  # noqa: B905 - a cycle has no end
        jobs, master = from_command_line([f"experiment={preset}", f"hydra/launcher={name}"])[1:]
        kind = "Local" if name == "local" else "Slurm"
        assert master.hydra.launcher._target_ == f"hydra_plugins.gsdg_launchers.{kind}Sweep", preset
        assert master.hydra.sweeper._target_ == "hydra_plugins.gsdg_sweep.GridSweeper", preset
        assert jobs == from_command_line([f"experiment={preset}"])[1], preset


def test_the_presets_survive_preemption_and_the_time_limit():
    for name in ("slurm", "slurm_cpu"):
        settings = launcher(f"hydra/launcher={name}")
        Task("slurm", settings).check()
        assert settings["max_num_timeout"] >= 100
        assert settings["additional_parameters"]["requeue"] is True
        assert Task("slurm", settings).wants_gpu == (name == "slurm")


def test_every_setting_of_submitits_launcher_can_be_overridden():
    changed = ("partition=gpu", "account=me", "constraint=a100", "setup=[module load cuda]")
    reservation = "+hydra.launcher.additional_parameters.reservation=r"
    settings = launcher("hydra/launcher=slurm", *(f"hydra.launcher.{text}" for text in changed), reservation)
    assert (settings["partition"], settings["account"], settings["constraint"]) == ("gpu", "me", "a100")
    assert settings["setup"] == ["module load cuda"]
    assert settings["additional_parameters"] == {"requeue": True, "reservation": "r"}
    for text, value in (("2", 2), ("a100:2", "a100:2"), ("null", None)):
        gpus = launcher("hydra/launcher=slurm", f"hydra.launcher.gpus_per_node={text}")["gpus_per_node"]
        assert gpus == value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["-m", "hydra.sweep.subdir=x"], "hydra.sweep.subdir=x: a run's folder is <runs_dir>/<run id>"),
        (["-m", "hydra/launcher=slurm", "hydra.launcher.submitit_folder=x"], "jobs and logs are in <runs_dir>/.sweeps"),
        (["-m", "hydra/launcher=local", "hydra.launcher.name=x"], "name=x has no effect with hydra/launcher=local"),
        (["hydra/launcher=slurm"], "needs -m"),  # Hydra would run it here
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_setting_that_would_be_ignored_is_refused_before_anything_is_composed(launch, overrides, message):
    answer = launch(*overrides, *SMALL)
    assert answer.returncode == 1
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not list(launch.runs_dir.glob("*/status.json"))
