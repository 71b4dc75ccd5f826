"""A preset of the user's own, in another folder: it wins over conf/config.yaml, the command line over it."""

from __future__ import annotations

import json

import pytest
from helpers import SMALL, Launcher, only_run
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from gsdg.errors import UserError
from gsdg.experiment import prepare
from gsdg.sweep.grid import CONF

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
    "hydra/job_logging": ("default", "stdout"),
}


@pytest.fixture
def mine(tmp_path):
    """A folder for --config-dir, with a preset and what it sets for one algorithm only."""
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
    """The whole config, Hydra's node included, of `python launch.py --config-dir ... experiment=mine <overrides>`."""

    def composed(*overrides: str):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            whole = [f"hydra.searchpath=[file://{mine}]", *overrides]
            return GlobalHydra.instance().hydra.compose_config("config", whole, RunMode.MULTIRUN)

    return composed


def of_the_task(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


@pytest.mark.parametrize("key", VALUES)
def test_a_presets_value_wins_over_the_base_and_the_command_line_over_it(composed, key):
    value, other = VALUES[key]
    assert composed()[key] != value
    assert composed("experiment=mine")[key] == value
    assert composed("experiment=mine", f"{key}={other}")[key] == other


@pytest.mark.parametrize("group", CHOICES)
def test_so_does_what_it_chooses_of_hydras(composed, group):
    value, other = CHOICES[group]
    assert composed().hydra.runtime.choices[group] == other
    assert composed("experiment=mine").hydra.runtime.choices[group] == value
    assert composed("experiment=mine", f"{group}={other}").hydra.runtime.choices[group] == other
    sweepers = {composed(*more).hydra.sweeper._target_ for more in ([], ["experiment=mine"])}
    assert sweepers == {
        "hydra_plugins.gsdg_sweep.GridSweeper",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    }


def test_the_folders_of_hydra_follow_a_presets_runs_dir(composed):
    assert composed("experiment=mine").hydra.run.dir == "mine_runs"
    assert composed("experiment=mine", "runs_dir=x").hydra.sweep.dir.startswith("x/.sweeps/")


def test_what_a_preset_sets_for_one_algorithm_is_set_for_no_other(composed):
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


@pytest.mark.slow
def test_a_run_is_made_as_its_preset_says(tmp_path, mine):
    """Through launch.py: seed and runs_dir are the preset's, one that the command line names is the command line's."""
    launch = Launcher(tmp_path / "given")
    launch.runs_dir.mkdir()
    (mine / "experiment" / "mine.yaml").write_text(
        MINE.replace("runs_dir: mine_runs", f"runs_dir: {tmp_path / 'mine_runs'}").replace(
            "  - override /hydra/launcher: local\n", ""
        )
    )
    command = ["--config-dir", str(mine), "experiment=mine", "algorithm=erm", "model=my_network", *SMALL, "seed=8"]
    answer = launch.run_as_given(*command)
    assert answer.returncode == 0, answer.stderr
    config = json.loads((only_run(tmp_path / "mine_runs") / "config.json").read_text())
    assert (config["seed"], config["deterministic"], config["trainer"]["steps"]) == (8, False, 3)
    assert (config["data_dir"], config["model"]["name"]) == ("mine_data", "my_network")


@pytest.mark.slow
def test_a_sweep_is_launched_as_its_preset_says(tmp_path, mine):
    """`override /hydra/launcher` and a sweep of its own; its sweeper is what Hydra has saved of it."""
    launch = Launcher(tmp_path / "given")
    launch.runs_dir.mkdir()
    sweep = "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      algorithm: erm,irm\n"
    (mine / "experiment" / "mine.yaml").write_text(
        MINE.replace("runs_dir: mine_runs", f"runs_dir: {tmp_path / 'mine_runs'}").replace(": basic", ": mine") + sweep
    )
    (mine / "hydra" / "sweeper").mkdir(parents=True)
    (mine / "hydra" / "sweeper" / "mine.yaml").write_text("defaults: [grid, _self_]\nmax_batch_size: 3\n")
    answer = launch.run_as_given("--config-dir", str(mine), "experiment=mine", *SMALL)
    assert answer.returncode == 0, answer.stderr
    assert len(list((tmp_path / "mine_runs").glob("*/model.pt"))) == 2
    (saved,) = (tmp_path / "mine_runs" / ".sweeps").glob("*/multirun.yaml")
    assert "max_batch_size: 3" in saved.read_text()
    assert list(saved.parent.glob("jobs/*")), "the launcher is `local`, whose tasks have logs"
