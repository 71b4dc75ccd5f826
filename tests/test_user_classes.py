"""Classes of the user, written as in CONTRIBUTING: their frozen configs can be prepared again, also in a task."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPOSITORY, SMALL, copy_checkout, in_case, photos, status

from gsdg.experiment import inputs_here, run
from gsdg.plan import prepare
from gsdg.sweep.compose import from_command_line
from gsdg.sweep.enumerate_runs import freeze_runs
from gsdg.sweep.folder import FrozenRun
from gsdg.sweep.prefetch import missing_inputs, prefetch
from gsdg.utils.errors import UserError

CLASSES = '''
import numpy as np
import torch
from PIL import Image

from gsdg.algorithms.erm import ERM
from gsdg.data.dataset import Domain, DomainDataset
from gsdg.models import convnet


class Shades:
    """A data set that takes no argument `domains`."""

    name, domains, augment, channels, cache = "shades", ["a", "b", "c"], "none", 1, None

    def __init__(self, *, folder: str = "", labels: dict | None = None) -> None:
        self.folder, self.labels = folder, labels

    def read(self) -> DomainDataset:
        labels = np.arange(20, dtype=np.int64) % 2
        images = [Image.new("RGB", (28, 28), (int(label) * 99,) * 3) for label in labels]
        return DomainDataset("shades", ["0", "1"], {name: Domain(name, labels, images.__getitem__) for name in "abc"})


class Chosen(Shades):
    """A data set with the argument `domains`."""

    def __init__(self, *, domains: list[str], data_dir: str) -> None:
        self.domains, self.data_dir = domains, data_dir


class Mine(ERM):
    def __init__(self, *, note: str = "") -> None:
        super().__init__()
        self.note = note


def backbone(weights: str | None = None, *, note: str = ""):
    return convnet(None, channels=3)


class Momentum(torch.optim.SGD):
    pass
'''
BACKBONE = "backbone:\n  _target_: b_user_classes.backbone\n  _partial_: true\n  note: x\n"
FILES = {
    "dataset/shades.yaml": "_target_: b_user_classes.Shades\nname: shades\nfolder: plain\nlabels: null\n",
    "dataset/chosen.yaml": "_target_: b_user_classes.Chosen\nname: chosen\ndomains: [a, b]\n",
    "algorithm/mine.yaml": "_target_: b_user_classes.Mine\nname: mine\nnote: x\n",
    "model/mine.yaml": f"defaults: [convnet, _self_]\nname: mine\n{BACKBONE}",
    "optimizer/mine.yaml": "_target_: b_user_classes.Momentum\nname: mine\nlr: 0.01\nmomentum: 0.9\n",
}
CHOICES = [file.removesuffix(".yaml").replace("/", "=") for file in FILES]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with the module and its YAML files, in Python's path."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "b_user_classes.py").write_text(CLASSES)
    for file, text in FILES.items():
        (tmp_path / "mine" / "conf" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / "conf" / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def plan(compose, place):
    def plan(*overrides: str):
        return prepare(compose(f"hydra.searchpath=[file://{place / 'conf'}]", *overrides))

    return plan


def again(plan):
    return prepare(json.loads(json.dumps(plan.config)))


def test_a_plan_of_a_users_class_prepares_again(plan):
    for choice in CHOICES:
        first = plan(choice, "split.target=a" if choice.startswith("dataset") else "split.target=15")
        second = again(first)
        with in_case(choice):
            assert (second.config, second.run_id) == (first.config, first.run_id)
            assert again(second).config == first.config


def test_a_data_set_without_the_argument_domains_is_trained_prefetched_and_found_done(plan, caplog):
    caplog.set_level("INFO")
    first = plan("dataset=shades", "split.target=a", *SMALL[1:], "trainer.steps=1")
    assert first.config["dataset"]["domains"] == ["a", "b", "c"]
    run(first)
    run(again(first))
    assert "done already" in caplog.text
    assert set(inputs_here(first.config)["data"]["domains"]) == set("abc")
    assert missing_inputs([first.config]) == []
    lines: list[str] = []
    prefetch([FrozenRun(first.run_id, [], first.config).config], lines.append)
    assert lines[0] == "shades: 60 images of 3 domains, in memory"


def test_domains_are_an_unknown_key_for_a_class_without_this_argument(plan):
    with pytest.raises(UserError, match=r"unknown key dataset\.domains.*Valid here: folder, labels"):
        plan("dataset=shades", "split.target=a", "+dataset.domains=[a,b]")


def test_text_that_looks_like_an_interpolation_stays_unchanged_and_names_a_folder(plan, tmp_path):
    first = plan("dataset=shades", "split.target=a")
    for text in ("${q}", "a${b}c", r"back\slash", r"\${q}", r"\\${q:r}${s}", "$HOME", "{x}", "${"):
        config = {**first.config, "dataset": {**first.config["dataset"], "folder": text, "labels": {"x": [text]}}}
        second = prepare(config)
        with in_case(text):
            assert (second.source.folder, second.source.labels) == (text, {"x": [text]})
            assert again(second).config == second.config == config
    root = photos(tmp_path / "${q}" / "photos")
    data = ("dataset=image_folder", rf"data_dir={tmp_path}/\${{q}}", "dataset.root=photos", "split.target=b")
    first = plan(*data, "model=resnet18", "model.weights=null", "model.freeze_bn=false")
    assert first.source.root == root
    assert again(first).source.root == root
    assert set(inputs_here(first.config)["data"]["domains"]) == set("abc")


def test_keys_that_a_task_would_read_differently_are_refused_before_a_sweep_is_submitted(place):
    def frozen(labels: str) -> FrozenRun:
        overrides = ["dataset=shades", "split.target=a", f"dataset.labels={labels}"]
        composer, jobs, _ = from_command_line(overrides, place / "conf")
        (run,) = freeze_runs(composer, jobs)
        return run

    for labels, key in {"{0: a}": "0", "{x: [{1.5: a}]}": "1.5", "{true: a}": "True"}.items():
        with in_case(labels), pytest.raises(UserError, match=rf"dataset\.labels.*: found the key {re.escape(key)} "):
            frozen(labels)
    assert prepare(json.loads(json.dumps(frozen("{x: a}").config))).source.labels == {"x": "a"}


# ---- in the tasks of a sweep ----------------------------------------------------------------------------------------

RUN = [*(text for text in SMALL if not text.startswith("split.target")), "trainer.steps=2"]


@pytest.mark.slow
def test_tasks_run_the_users_modules_as_they_were_at_submission(tmp_path):
    """A data set beside launch.py, an algorithm on PYTHONPATH, and a module that each of them imports.

    All are broken after the first of two runs has begun, and before the second.
    """
    checkout, elsewhere = copy_checkout(tmp_path / "checkout"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    classes = {checkout / "b_user_classes.py": "b_user_helper", elsewhere / "b_user_algorithm.py": "b_user_algebra"}
    for path, helper in classes.items():
        path.write_text(f"import {helper}\n{CLASSES}")
        (path.parent / f"{helper}.py").write_text("X = 1\n")
    for file, module in {"dataset/shades.yaml": "b_user_classes", "algorithm/mine.yaml": "b_user_algorithm"}.items():
        (checkout / "conf" / file).write_text(FILES[file].replace("b_user_classes", module))
    runs_dir = tmp_path / "runs"
    sweep = ["-m", "hydra/launcher=local", "dataset=shades", "algorithm=mine", "split.target=a,b", *RUN]
    command = [sys.executable, str(checkout / "launch.py"), *sweep, "data_dir=/tmp", f"runs_dir={runs_dir}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(elsewhere)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    while not list(runs_dir.glob("*/status.json")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    modules = [*checkout.glob("b_user_*.py"), *elsewhere.glob("b_user_*.py")]
    for path in modules:
        path.write_text("raise SystemExit('the edited module was run')\n")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert [status(path.parent)["state"] for path in runs_dir.glob("*/status.json")] == ["done", "done"]
    (copy,) = (runs_dir / ".code").iterdir()
    assert len(modules) == 4
    assert {path.name for path in copy.iterdir()} >= {path.name for path in modules} | {"gsdg"}


@pytest.mark.slow
def test_a_retry_that_would_not_find_the_users_module_is_refused_with_the_fix(
    place, launch_here, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(place))
    sweep = ("-m", "--config-dir", str(place / "conf"), "dataset=shades", *RUN, "hydra/launcher=local")
    answer = launch_here(*sweep, "split.target=a")
    assert answer.returncode == 0, answer.stderr
    (run_folder,) = (path.parent for path in (tmp_path / "runs").glob("*/status.json"))
    shutil.rmtree(run_folder)

    def retry(*path: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "gsdg.sweep", "retry", "--runs-dir", "runs"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, *path)))}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    answer = retry()
    assert answer.returncode == 2
    assert f"not found from here: b_user_classes.\nGive the command in {tmp_path}" in answer.stderr
    answer = retry(place)
    assert "1 to submit" in answer.stdout, answer.stderr
    while not (run_folder / "status.json").exists() or status(run_folder)["state"] == "running":
        time.sleep(0.1)
    assert status(run_folder)["state"] == "done"
