"""A preset of the user in another folder: it overrides conf/config.yaml, and the command line overrides it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from helpers import SMALL, in_case, only_run, photos
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from gsdg.config.choices import CONF
from gsdg.config.config_dirs import config_dir_of
from gsdg.data.__main__ import main as data_command
from gsdg.plan import prepare
from gsdg.sweep.__main__ import main as sweep_command
from gsdg.sweep.compose import from_command_line
from gsdg.sweep.submit import prepare_command
from gsdg.utils.errors import UserError

MINE = """# @package _global_
defaults:
  - override /hydra/sweeper: basic
  - override /hydra/launcher: local
  - override /hydra/job_logging: default
seed: 7
deterministic: false
device: cpu
data_dir: mine_data
runs_dir: mine_runs
force: true
resubmit: missing
trainer:
  steps: 3
"""
VALUES = {
    "seed": (7, 8),
    "deterministic": (False, True),
    "device": ("cpu", "auto"),
    "data_dir": ("mine_data", "other_data"),
    "runs_dir": ("mine_runs", "other_runs"),
    "force": (True, False),
    "resubmit": ("missing", "all"),
}
CHOICES = {
    "hydra/sweeper": ("basic", "grid"),
    "hydra/launcher": ("local", "basic"),
    "hydra/job_logging": ("default", "console"),
}


@pytest.fixture
def mine(tmp_path):
    """A folder for --config-dir, with a preset that sets some keys for one algorithm only."""
    folder = tmp_path / "my_conf"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment_algorithm").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(MINE)
    (folder / "experiment_algorithm" / "mine_mixup.yaml").write_text("alpha: 0.3\n")
    (folder / "model").mkdir()
    own = (CONF / "model" / "convnet.yaml").read_text().replace("name: convnet", "name: my_network")
    (folder / "model" / "my_network.yaml").write_text(own)
    return folder


@pytest.fixture
def composed(mine):
    """The config of `python launch.py --config-dir ... experiment=mine <overrides>`, with Hydra's node."""

    def composed(*overrides: str):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            whole = [f"hydra.searchpath=[file://{mine}]", *overrides]
            return GlobalHydra.instance().hydra.compose_config("config", whole, RunMode.MULTIRUN)

    return composed


def of_the_task(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


def test_a_preset_overrides_the_base_config_and_the_command_line_overrides_the_preset(composed):
    base, preset = composed(), composed("experiment=mine")
    changed = composed("experiment=mine", *(f"{key}={other}" for key, (_, other) in VALUES.items()))
    for key, (value, other) in VALUES.items():
        with in_case(key):
            assert base[key] != value
            assert preset[key] == value
            assert changed[key] == other
    for group, (value, other) in CHOICES.items():  # choices of Hydra
        with in_case(group):
            assert base.hydra.runtime.choices[group] == other
            assert preset.hydra.runtime.choices[group] == value
            assert composed("experiment=mine", f"{group}={other}").hydra.runtime.choices[group] == other
    assert base.hydra.sweeper._target_ == "hydra_plugins.gsdg_sweep.GridSweeper"
    assert preset.hydra.sweeper._target_ == "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def test_the_folders_of_hydra_are_in_the_runs_dir_of_a_preset(composed):
    assert composed("experiment=mine").hydra.run.dir == str(Path.cwd() / "mine_runs")
    assert composed("experiment=mine", "runs_dir=x").hydra.sweep.dir.startswith(f"{Path.cwd() / 'x'}/.sweeps/")


def test_keys_that_a_preset_sets_for_one_algorithm_are_set_for_no_other(composed):
    assert composed("experiment=mine", "algorithm=mixup").algorithm.alpha == 0.3
    assert composed("experiment=mine", "algorithm=mixup", "algorithm.alpha=0.4").algorithm.alpha == 0.4
    assert composed("algorithm=mixup").algorithm.alpha == 0.2
    for name, alpha in {"mixstyle": 0.1, "selfreg": 0.5, "grad_surgery": 0.6, "pcgrad": 1}.items():
        assert composed("experiment=mine", f"algorithm={name}").algorithm.alpha == alpha


def test_a_preset_without_its_package_line_is_refused_instead_of_ignored(composed, mine):
    (mine / "experiment" / "mine.yaml").write_text("seed: 7\n")
    config = of_the_task(composed("experiment=mine", "split.target='15'"))
    with pytest.raises(UserError, match="found the keys seed in it.*\n.*# @package _global_"):
        prepare(config)


def test_a_model_of_ones_own_keeps_its_own_name(composed):
    config = of_the_task(composed("experiment=mine", "model=my_network", "split.target='15'"))
    assert prepare(config).config["model"]["name"] == "my_network"


# ---- --config-dir of the other commands -----------------------------------------------------------------------------


def test_a_sweep_is_planned_with_the_same_configs_as_it_is_launched_with(mine, composed):
    overrides = ["experiment=mine", "model=my_network", "split.target=15,30"]
    composer, jobs, master = from_command_line(overrides, mine)
    assert [job[-1] for job in jobs] == ["split.target=15", "split.target=30"]
    whole = composed("experiment=mine", "model=my_network", "split.target=15")
    assert composer.compose(jobs[0]) == of_the_task(whole)
    assert master.hydra.runtime.choices == {**composed(*overrides[:2]).hydra.runtime.choices}
    assert config_dir_of(master) == str(mine)
    assert config_dir_of(from_command_line(["split.target=15"])[2]) is None


def test_plan_takes_a_folder_of_configs(mine, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(mine.parent)
    words = ["experiment=mine", "model=my_network", "split.target=15", f"runs_dir={tmp_path / 'r'}"]
    for option in ("--config-dir", "-cd"):
        assert sweep_command(["plan", option, mine.name, *words]) == 0, capsys.readouterr().err
        assert "1 run: 1 to submit" in capsys.readouterr().out
        assert sweep_command(["plan", option, "nowhere", *words]) == 2
        assert f"--config-dir {mine.parent / 'nowhere'}: there is no such folder" in capsys.readouterr().err
    assert sweep_command(["plan", *words]) == 2


def test_data_commands_take_a_folder_of_configs(mine, tmp_path, capsys):
    photos(tmp_path / "d" / "own")
    (mine / "dataset").mkdir()
    text = (CONF / "dataset" / "image_folder.yaml").read_text().replace("???", "own").replace("image_folder", "own")
    (mine / "dataset" / "own.yaml").write_text(text)
    words = ["own", f"data_dir={tmp_path / 'd'}"]
    assert data_command(["verify", *words, "--config-dir", str(mine)]) == 0, capsys.readouterr()
    assert data_command(["show", "--config-dir", str(mine), *words, "--out", str(tmp_path / "own.png")]) == 0
    assert (tmp_path / "own.png").exists()
    capsys.readouterr()
    assert data_command(["verify", *words]) == 1


def test_the_command_that_a_launch_names_works_when_pasted(mine, tmp_path):
    """Folders with spaces, a search path and values that a shell would take apart."""
    place = tmp_path / "my confs & more"
    mine.rename(place)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    overrides = ["experiment=mine", "split.target='15'", "data_dir=/a b/$HOME", "algorithm.partition.patterns=[*a,b]"]
    command = prepare_command({"config_dir": str(place), "overrides": overrides})
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": "/x"}
    said = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["-m", "gsdg.sweep", "prepare", "--config-dir", str(place), *overrides]


def test_a_run_is_made_as_its_preset_says(tmp_path, mine, launch_here):
    """Seed and runs_dir are the preset's, one that the command line names is the command line's."""
    preset = MINE.replace("runs_dir: mine_runs", f"runs_dir: {tmp_path / 'mine_runs'}")
    preset = preset.replace("  - override /hydra/launcher: local\n", "")
    (mine / "experiment" / "mine.yaml").write_text(preset)
    words = ["--config-dir", str(mine), "experiment=mine", "algorithm=erm", "model=my_network", *SMALL, "seed=8"]
    answer = launch_here(*words)
    assert answer.returncode == 0, answer.stderr
    config = json.loads((only_run(tmp_path / "mine_runs") / "config.json").read_text())
    assert (config["seed"], config["deterministic"], config["trainer"]["steps"]) == (8, False, 3)
    assert (config["data_dir"], config["model"]["name"]) == (str(tmp_path / "mine_data"), "my_network")


@pytest.mark.slow
def test_a_sweep_is_launched_as_its_preset_says(tmp_path, mine, launch_here):
    """`override /hydra/launcher` and a sweep of its own; its sweeper is what Hydra has saved of it."""
    preset = MINE.replace("runs_dir: mine_runs", f"runs_dir: {tmp_path / 'mine_runs'}").replace(": basic", ": mine")
    preset += "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      algorithm: erm,irm\n"
    (mine / "experiment" / "mine.yaml").write_text(preset)
    (mine / "hydra" / "sweeper").mkdir(parents=True)
    (mine / "hydra" / "sweeper" / "mine.yaml").write_text("defaults: [grid, _self_]\nmax_batch_size: 3\n")
    answer = launch_here("--config-dir", str(mine), "experiment=mine", *SMALL)
    assert answer.returncode == 0, answer.stderr
    assert len(list((tmp_path / "mine_runs").glob("*/weights.json"))) == 2
    (saved,) = (tmp_path / "mine_runs" / ".sweeps").glob("*/multirun.yaml")
    assert "max_batch_size: 3" in saved.read_text()
    assert list(saved.parent.glob("jobs/*")), "the launcher is `local`, whose tasks have logs"
    assert json.loads((saved.parent / "sweep.json").read_text())["config_dir"] == str(mine)
