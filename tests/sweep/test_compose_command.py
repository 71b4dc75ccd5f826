"""From a sweep's command line to the overrides of every run, as in `python launch.py -m`; the sweeper."""

from __future__ import annotations

import ast
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

from gsdg.sweep.compose import from_command_line

# ---- enumeration ------------------------------------------------------------------------------------------------


def test_the_runs_are_the_product_in_order_and_the_last_key_varies_fastest():
    for overrides, values in (
        ([], []),
        (["seed=3", "hydra.job.name=x"], [["seed=3"]]),
        (
            ["trainer.steps=5", "seed=1,2", "algorithm=erm,grad_surgery"],
            [["trainer.steps=5"], ["seed=1", "seed=2"], ["algorithm=erm", "algorithm=grad_surgery"]],
        ),
        (["optimizer=glob(adam*)", "seed=range(1,3)"], [["optimizer=adam", "optimizer=adamw"], ["seed=1", "seed=2"]]),
        (  # the grid of a preset, where the command line wins
            ["experiment=quickstart", "split.target=15", "seed=1,2"],
            [["algorithm=erm", "algorithm=grad_surgery"], ["split.target=15"], ["experiment=quickstart"],
             ["seed=1", "seed=2"]],
        ),
    ):  # fmt: skip
        expected = [list(job) for job in itertools.product(*values)]
        assert from_command_line(overrides)[1] == expected, overrides


def test_a_sweep_over_presets_or_without_values_is_refused(refusal):
    for override, message in (
        ("experiment=swad,quickstart", "one `experiment=` per command"),
        ("experiment=choice(swad,quickstart)", "one `experiment=` per command"),
        ("seed=interval(0,1)", "an interval is not a list of values"),
        ("seed=range(3,3)", "seed=range(3,3) has no values, so the sweep has no runs"),
        ("model=glob(zz*)", "glob(PATTERN) chooses among the files of model: clip_b16, "),
    ):
        assert message in refusal(from_command_line, [override, "device=cpu"]), override


def test_overrides_that_cannot_be_enumerated_are_refused_with_hydras_message_and_hydra_is_left_as_it_was():
    """In a notebook, neither a valid nor a wrong command line may break the next hydra.initialize."""
    from_command_line(["seed=1,2"])
    assert not GlobalHydra.instance().is_initialized()
    for override, message in (
        ("hydra.job.name=a,b", "Sweeping over Hydra's configuration is not supported"),
        ("optimizer=adamm", "Could not find 'optimizer/adamm'"),
        ("seed=[1", "no viable alternative"),
        ("seeds=1", "Could not override 'seeds'"),
    ):
        with pytest.raises(HydraException, match=message):
            from_command_line([override])
        assert not GlobalHydra.instance().is_initialized(), override


def test_the_sweeps_own_config_comes_with_it():
    master = from_command_line(["seed=1,2", "runs_dir=here", "hydra.launcher=null"])[2]
    assert (master.runs_dir, master.hydra.job.name, master.hydra.mode) == ("here", "launch", RunMode.MULTIRUN)
    assert list(master.hydra.overrides.task) == ["seed=1,2", "runs_dir=here"]


# ---- as processes -----------------------------------------------------------------------------------------------

RECORDER = '''
"""A launcher that runs nothing and records its arguments."""
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
        self.record(jobs=jobs, last=None)  # before composing: a wrong config must not get here
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
    """The arguments that `python launch.py` passes to its launcher, and the output of the command."""
    (tmp_path / "plugins" / "hydra_plugins").mkdir(parents=True)
    (tmp_path / "plugins" / "hydra_plugins" / "recorder.py").write_text(RECORDER)
    path = f"{tmp_path / 'plugins'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    launch.environment |= {"RECORD": str(tmp_path / "record.json"), "PYTHONPATH": path}

    def recorded(*overrides: str) -> tuple[dict | None, subprocess.CompletedProcess]:
        answer = launch(*overrides, "hydra/sweeper=grid", "hydra/launcher=recorder")
        record = tmp_path / "record.json"
        return (json.loads(record.read_text()) if record.exists() else None), answer

    return recorded


def test_from_command_line_is_what_launch_launches(recorded, launch):
    for overrides in (
        ("experiment=quickstart", "hydra.sweeper.params.algorithm='erm,${algorithm.name}'", "split.target=15,30"),
        ("-m", "seed=1,2", "+note='a,${seed}',${seed},'[x]'", "algorithm=glob(*_mask)", "trainer.steps=range(3,9,3)"),
    ):
        record, answer = recorded(*overrides)
        assert record, answer.stderr
        plain = [*(o for o in overrides if o != "-m"), f"runs_dir={launch.runs_dir}"]
        composer, jobs, _ = from_command_line(plain)
        assert jobs == record["jobs"]
        assert OmegaConf.to_container(composer.compose(jobs[-1]), resolve=False) == record["last"]


def test_a_sweep_with_a_wrong_config_or_over_presets_is_refused_before_anything_is_launched(recorded):
    for overrides, message in (
        (("seed=1,2", "algorithm=grad_surgery,erm", "algorithm.alpha=1"), "unknown key algorithm.alpha."),
        (("experiment=swad,domainbed_head",), "error: experiment=swad,domainbed_head: Hydra drops"),
    ):
        record, answer = recorded("-m", *overrides)
        assert record is None
        assert answer.returncode == 1
        assert message in answer.stderr
        assert "Traceback" not in answer.stderr


def test_a_launcher_that_composes_is_not_preceded(recorded):
    record, answer = recorded("-m", "algorithm=grad_surgery,erm", "algorithm.alpha=1", "hydra.launcher.composes=true")
    assert answer.returncode == 0, answer.stderr
    assert [job[0] for job in record["jobs"]] == ["algorithm=grad_surgery", "algorithm=erm"]


def test_planning_and_status_import_nothing_slow_and_write_nothing(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import gsdg.sweep.__main__, gsdg.sweep.status_text
from gsdg.sweep.compose import from_command_line
composer, jobs, _ = from_command_line(["experiment=quickstart", "seed=1,2"])
assert len([composer.compose(job) for job in jobs]) == 24
print([name for name in ("torch", "pandas", "submitit") if name in sys.modules])
"""
    command = [sys.executable, "-B", "-W", "error", "-c", code]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.stdout == "[]\n", answer.stderr
    assert list(Path(tmp_path).iterdir()) == []


def test_the_plugin_imports_only_the_list_of_choices():
    """Hydra imports it at every start, even for --help."""
    code = """
import sys
import hydra.main, hydra._internal.core_plugins.basic_sweeper
before = set(sys.modules)
import hydra_plugins.gsdg_sweep
print(sorted(set(sys.modules) - before))
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    modules = {name for name in ast.literal_eval(answer.stdout) if name.split(".")[0] in ("gsdg", "torch", "pandas")}
    assert modules == {"gsdg", "gsdg.config", "gsdg.config.choices"}


def test_the_sweeper_is_hydras_basic_one_but_for_its_name():
    basic, ours = (
        OmegaConf.to_container(from_command_line([f"hydra/sweeper={name}"])[2].hydra.sweeper)
        for name in ("basic", "grid")
    )
    assert ours.pop("_target_") == "hydra_plugins.gsdg_sweep.GridSweeper"
    del basic["_target_"]
    assert basic == ours
