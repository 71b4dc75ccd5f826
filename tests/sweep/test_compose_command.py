"""What a sweep's command line comes to: the overrides of every run, as `python launch.py -m` has them; the sweeper."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from gsdg.errors import UserError
from gsdg.sweep import grid
from gsdg.sweep.grid import from_command_line

# ---- enumeration ------------------------------------------------------------------------------------------------


def test_the_product_is_in_order_and_the_last_axis_turns_fastest():
    jobs = from_command_line(["trainer.steps=5", "seed=1,2", "algorithm=erm,grad_surgery"])[1]
    expected = itertools.product(["trainer.steps=5"], ["seed=1", "seed=2"], ["algorithm=erm", "algorithm=grad_surgery"])
    assert jobs == [list(job) for job in expected]


def test_without_commas_there_is_one_run():
    assert from_command_line([])[1] == [[]]
    assert from_command_line(["seed=3", "hydra.job.name=x"])[1] == [["seed=3"]]


def test_a_presets_sweep_is_enumerated_and_the_command_line_beats_it():
    jobs = from_command_line(["experiment=quickstart", "split.target=15", "seed=1,2"])[1]
    assert jobs == [
        [f"algorithm={algorithm}", "split.target=15", "experiment=quickstart", f"seed={seed}"]
        for algorithm in ("erm", "grad_surgery")
        for seed in (1, 2)
    ]


def test_sweeps_by_pattern_and_range_are_enumerated():
    jobs = from_command_line(["optimizer=glob(adam*)", "seed=range(1,3)"])[1]
    assert jobs == [[f"optimizer={o}", f"seed={s}"] for o in ("adam", "adamw") for s in (1, 2)]


@pytest.mark.parametrize("swept", ["experiment=swad,quickstart", "experiment=choice(swad,quickstart)"])
def test_sweeping_over_presets_is_refused(swept):
    with pytest.raises(UserError, match="one `experiment=` a command"):
        from_command_line([swept, "seed=1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=interval(0,1)"], "does not support sweep type"),
        (["hydra.job.name=a,b"], "Sweeping over Hydra's configuration is not supported"),
        (["optimizer=adamm"], "Could not find 'optimizer/adamm'"),
        (["seed=[1"], "no viable alternative"),
    ],
)
def test_what_cannot_be_enumerated_is_refused_in_hydras_words(overrides, message):
    with pytest.raises(HydraException, match=message):
        from_command_line(overrides)


def test_the_sweeps_own_config_comes_with_it():
    master = from_command_line(["seed=1,2", "runs_dir=here", "hydra.launcher=null"])[2]
    assert (master.runs_dir, master.hydra.job.name, master.hydra.mode) == ("here", "launch", RunMode.MULTIRUN)
    assert list(master.hydra.overrides.task) == ["seed=1,2", "runs_dir=here"]


def test_hydra_is_left_as_it_was():
    """A plan inside a notebook must not make the next initialize fail; wrong ones neither."""
    from_command_line(["seed=1,2"])
    assert not GlobalHydra.instance().is_initialized()
    with pytest.raises(HydraException):
        from_command_line(["seeds=1"])
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.skipif(not importlib.util.find_spec("gsdg.conf"), reason="gsdg is not installed: pip install -e .")
def test_installed_configs_are_found_too(monkeypatch, tmp_path):
    overrides = ["experiment=quickstart", "seed=1,2"]
    checkout, jobs, _ = from_command_line(overrides)
    monkeypatch.setattr(grid, "CONF", tmp_path / "nowhere")
    installed, same_jobs, master = from_command_line(overrides)
    assert any(source.path == "gsdg.conf" for source in master.hydra.runtime.config_sources)
    assert same_jobs == jobs
    assert installed.compose(jobs[-1]) == checkout.compose(jobs[-1])


# ---- as processes -----------------------------------------------------------------------------------------------

RECORDER = '''
"""A launcher that runs nothing and writes down what it was given."""
import json
import os

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf


class Recorder(Launcher):
    def __init__(self, composes):
        self.composes = composes

    def setup(self, *, hydra_context, task_function, config):
        self.loader, self.config = hydra_context.config_loader, config

    def launch(self, job_overrides, initial_job_idx):
        jobs = [list(job) for job in job_overrides]
        self.record(jobs=jobs, last=None)  # before composing: a wrong config must not come this far
        if not self.composes:
            config = OmegaConf.to_container(self.loader.load_sweep_config(self.config, jobs[-1]), resolve=False)
            del config["hydra"]
            self.record(jobs=jobs, last=config)
        return []

    def record(self, **found):
        with open(os.environ["RECORD"], "w") as file:
            json.dump(found, file)


node = {"_target_": "hydra_plugins.recorder.Recorder", "composes": False}
ConfigStore.instance().store(group="hydra/launcher", name="recorder", node=node)
'''


@pytest.fixture
def recorded(launch, tmp_path):
    """What `python launch.py` hands to its launcher, and its answer."""
    (tmp_path / "plugins" / "hydra_plugins").mkdir(parents=True)
    (tmp_path / "plugins" / "hydra_plugins" / "recorder.py").write_text(RECORDER)
    path = f"{tmp_path / 'plugins'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    launch.environment |= {"RECORD": str(tmp_path / "record.json"), "PYTHONPATH": path}

    def recorded(*overrides: str) -> tuple[dict | None, subprocess.CompletedProcess]:
        answer = launch(*overrides, "hydra/sweeper=grid", "hydra/launcher=recorder")
        record = tmp_path / "record.json"
        return (json.loads(record.read_text()) if record.exists() else None), answer

    return recorded


@pytest.mark.parametrize(
    "overrides",
    [
        ("experiment=quickstart", "split.target=15,30"),
        ("-m", "seed=1,2", "+note='a,${seed}',${seed},'[x]'", "algorithm=glob(*_mask)", "trainer.steps=range(3,9,3)"),
        ("experiment=quickstart", "hydra.sweeper.params.algorithm='erm,${algorithm.name}'", "seed=2"),
    ],
)
def test_from_command_line_is_what_launch_launches(recorded, launch, overrides):
    record, answer = recorded(*overrides)
    assert record, answer.stderr
    plain = [*(o for o in overrides if o != "-m"), f"runs_dir={launch.runs_dir}"]
    composer, jobs, _ = from_command_line(plain)
    assert jobs == record["jobs"]
    assert OmegaConf.to_container(composer.compose(jobs[-1]), resolve=False) == record["last"]


def test_a_wrong_config_among_many_is_refused_before_anything_is_launched(recorded):
    record, answer = recorded("-m", "seed=1,2", "algorithm=grad_surgery,erm", "algorithm.alpha=1")
    assert record is None
    assert answer.returncode == 1
    assert "Could not override 'algorithm.alpha'" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_launcher_that_composes_is_not_preceded(recorded):
    record, answer = recorded("-m", "algorithm=grad_surgery,erm", "algorithm.alpha=1", "hydra.launcher.composes=true")
    assert answer.returncode == 0, answer.stderr
    assert [job[0] for job in record["jobs"]] == ["algorithm=grad_surgery", "algorithm=erm"]


def test_launching_a_sweep_over_presets_is_refused(recorded):
    record, answer = recorded("-m", "experiment=swad,domainbed_head")
    assert record is None
    assert answer.returncode == 1
    assert "error: experiment=swad,domainbed_head: Hydra drops" in answer.stderr


def test_planning_imports_no_torch_and_writes_nothing(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from gsdg.sweep.grid import from_command_line
composer, jobs, _ = from_command_line(["experiment=quickstart", "seed=1,2"])
assert len([composer.compose(job) for job in jobs]) == 24
print([name for name in ("torch", "pandas", "submitit") if name in sys.modules])
"""
    command = [sys.executable, "-B", "-W", "error", "-c", code]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.stdout == "[]\n", answer.stderr
    assert list(Path(tmp_path).iterdir()) == []


def test_the_plugin_costs_no_import_of_ours():
    """Hydra imports it at every start, even for --help."""
    code = """
import sys
import hydra.main, hydra._internal.core_plugins.basic_sweeper
before = set(sys.modules)
import hydra_plugins.gsdg_sweep
print(sorted(set(sys.modules) - before))
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert answer.stdout == "['hydra_plugins', 'hydra_plugins.gsdg_sweep']\n", answer.stderr


def test_the_sweeper_is_hydras_basic_one_but_for_its_name():
    basic, ours = (
        OmegaConf.to_container(from_command_line([f"hydra/sweeper={name}"])[2].hydra.sweeper)
        for name in ("basic", "grid")
    )
    assert ours.pop("_target_") == "hydra_plugins.gsdg_sweep.GridSweeper"
    del basic["_target_"]
    assert basic == ours
