"""launch.py as a user runs it: answers, mistakes, sweeps."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import REPOSITORY, SMALL, Launcher, status

SWEEP = ("-m", "algorithm=erm,grad_surgery", "trainer.steps=4")


@pytest.mark.parametrize(
    ("override", "valid"),
    [
        ("optimizer.lrr=1", "Valid here: lr, weight_decay"),
        ("optimizer=adamm", "adamw"),
        ("spilt.target=15", "Valid here: algorithm, data_dir, dataset"),
        ("dataset=image_folder", "dataset.root"),
        ("split.target=[", "no viable alternative"),
    ],
)
def test_a_typo_is_a_message_with_what_is_valid_and_no_traceback(launch, override, valid):
    answer = launch(override)
    assert answer.returncode == 1
    assert valid in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.slow
def test_a_users_mistake_has_its_traceback_on_request(tmp_path):
    launch = Launcher(tmp_path / "runs")
    assert "Traceback" not in launch("split.target=17").stderr
    launch.environment["HYDRA_FULL_ERROR"] = "1"
    assert "Traceback" in launch("split.target=17").stderr


@pytest.mark.slow
def test_a_sweep_ends_with_its_table(launch):
    answer = launch(*SWEEP, *SMALL)
    assert answer.returncode == 0, answer.stderr
    table = answer.stdout[answer.stdout.index("rotated_digits, training_domain") :]
    assert "grad_surgery" in table
    assert "no such run" in table


@pytest.mark.slow
def test_one_failing_run_neither_stops_nor_hides_the_others(launch):
    answer = launch(*SWEEP, *SMALL, "optimizer=sgd", "optimizer.lr=1e30,1e-3")
    states = sorted(status(path.parent)["state"] for path in launch.runs_dir.glob("*/status.json"))
    assert states == ["done", "done", "failed", "failed"]
    assert answer.returncode == 1
    assert "failed at step" in answer.stdout


@pytest.mark.slow
def test_ctrl_c_saves_the_run_and_ends_the_sweep(launch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    process = launch.start(
        "-m", "algorithm=erm,grad_surgery", *SMALL, "trainer.steps=100000", "trainer.eval_every=100000"
    )
    while not any("step 1/" in path.read_text() for path in launch.runs_dir.glob("*/log.txt")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT
    assert "SIGINT: saving after this step" in errors
    assert "the same command again goes on from what was saved" in errors
    assert "Traceback" not in errors
    assert [status(path.parent)["state"] for path in launch.runs_dir.glob("*/status.json")] == ["stopped"]


@pytest.mark.slow
def test_sweeping_over_presets_is_refused(launch):
    answer = launch("-m", "experiment=swad,domainbed_head")
    assert answer.returncode == 1
    assert "one `experiment=` a command" in answer.stderr


@pytest.mark.slow
def test_an_installed_wheel_works_away_from_the_checkout(tmp_path):
    """`pip install .` into a folder: package, configs and digits are all in it, and it trains from elsewhere."""
    checkout = tmp_path / "checkout"  # a copy: pip leaves build/ behind, and would ship what an old one holds
    shutil.copytree(REPOSITORY, checkout, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info"))
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", tmp_path / "site", "."]
    subprocess.run([*install], cwd=checkout, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch", "trainer.steps=1", *SMALL]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "runs").is_dir()
    where = subprocess.run(
        [sys.executable, "-c", "import gsdg; print(gsdg.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert str(tmp_path) in where.stdout
