"""Paths are made absolute once, when the command starts; every part of the program uses the same folders."""

from __future__ import annotations

import copy
import shutil

import pytest
from helpers import SMALL, in_case, only_run, status

from gsdg.config.places import absolute_path, with_absolute_places
from gsdg.plan import prepare
from gsdg.sweep.compose import from_command_line
from gsdg.utils.errors import UserError

OURS = "gsdg.data.folders.ImageFolders"


def test_a_path_is_relative_to_its_base_and_a_tilde_is_a_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute_path("data") == f"{tmp_path}/data"
    assert absolute_path("data", "/base") == "/base/data"
    assert absolute_path("/data", "/base") == "/data"
    assert absolute_path("~/r", "/base") == "/home/me/r"
    assert absolute_path("./~/r") == f"{tmp_path}/~/r"
    with pytest.raises(UserError, match="runs_dir=~nobody_at_all/r: ~nobody_at_all is no user"):
        absolute_path("~nobody_at_all/r", key="runs_dir")


def test_the_folders_of_a_config_become_absolute_in_a_copy():
    caches = [(OURS, "auto", "auto"), (OURS, "off", "off"), (OURS, "c", "/base/c"), (OURS, None, None)]
    for target, cache, absolute in [*caches, ("mine.X", "c", "c")]:
        config = {"data_dir": "data", "runs_dir": "/runs", "dataset": {"_target_": target, "cache": cache}, "seed": 0}
        before = copy.deepcopy(config)
        dataset = {"_target_": target, "cache": absolute}
        expected = {"data_dir": "/base/data", "runs_dir": "/runs", "dataset": dataset, "seed": 0}
        assert with_absolute_places(config, "/base") == expected
        assert config == before


def test_a_plan_has_absolute_folders_and_its_id_is_the_same(compose, tmp_path, monkeypatch):
    ids = set()
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        plan = prepare(compose("split.target=15", "data_dir=data", "runs_dir=r"))
        assert plan.config["data_dir"] == str(tmp_path / place / "data")
        assert plan.config["runs_dir"] == str(tmp_path / place / "r")
        ids.add(plan.run_id)
    assert len(ids) == 1


def test_keys_with_one_value_per_sweep_are_not_swept():
    for key in ("runs_dir", "data_dir", "experiment"):
        with in_case(key), pytest.raises(UserError, match=f"^{key}=.*\n.*per command"):
            from_command_line([f"{key}=a,b"])


# ---- through launch.py: the run is in the chosen folder, and the second time nothing is trained --------

WAYS = [(), ("-m",), ("hydra.job.chdir=true",), ("-m", "hydra.job.chdir=true")]
TASKS = pytest.param(("-m", "hydra/launcher=local"), marks=pytest.mark.slow)


@pytest.mark.parametrize("more", [*WAYS, TASKS], ids=" ".join)
def test_a_run_is_made_where_its_runs_dir_says_and_found_there_again(tmp_path, monkeypatch, launch_here, more):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, place in (("~/r", "home/r"), ("r", "r")):
        command = (*more, *SMALL, "trainer.steps=2", "data_dir='~/data'", f"runs_dir='{given}'")
        first, again = launch_here(*command), launch_here(*command)
        assert first.returncode == again.returncode == 0, first.stdout + first.stderr + again.stderr
        folder = only_run(tmp_path / place)
        assert status(folder)["state"] == "done"
        assert len((folder / "environment.jsonl").read_text().splitlines()) == 1, "it was trained again"
        assert [path.parent for path in tmp_path.rglob("config.json")] == [folder]
        assert not (tmp_path / "~").exists()
        assert "rotated_digits, training_domain" in again.stdout or "-m" not in more
        shutil.rmtree(tmp_path / place)
