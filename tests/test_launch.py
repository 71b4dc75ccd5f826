"""launch.py as a user runs it: output, mistakes, sweeps."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import SMALL, copy_checkout, status

SWEEP = ("-m", "algorithm=erm,grad_surgery", "trainer.steps=4")


def test_a_mistake_is_a_message_with_what_is_valid_and_a_traceback_only_on_request(launch):
    answer = launch("optimizer=adamm")
    assert answer.returncode == 1
    assert "adamw" in answer.stderr
    assert "Traceback" not in answer.stderr
    launch.environment["HYDRA_FULL_ERROR"] = "1"
    assert "Traceback" in launch("split.target=17").stderr


def test_a_sweep_ends_with_its_table_and_does_not_make_later_errors_tracebacks(launch_here):
    answer = launch_here(*SWEEP, *SMALL)
    assert answer.returncode == 0, answer.stderr
    table = answer.stdout[answer.stdout.index("rotated_digits, training_domain") :]
    assert "grad_surgery" in table
    assert "no such run" in table
    assert "HYDRA_FULL_ERROR" not in os.environ


@pytest.mark.slow
def test_one_failing_run_neither_stops_nor_hides_the_others(launch):
    answer = launch(*SWEEP, *SMALL, "optimizer=sgd", "optimizer.lr=1e30,1e-3")
    states = sorted(status(path.parent)["state"] for path in launch.runs_dir.glob("*/status.json"))
    assert states == ["done", "done", "failed", "failed"]
    assert answer.returncode == 1
    assert "failed at step" in answer.stdout
    started = re.findall(r"^\[(\d)/4\] run ([0-9a-f]{12}), target 15, (erm|grad_surgery)$", answer.stdout, re.MULTILINE)
    assert [number for number, _, _ in started] == ["1", "2", "3", "4"]
    assert {name for _, name, _ in started} == {path.parent.name for path in launch.runs_dir.glob("*/status.json")}
    lines = answer.stdout.splitlines()
    failures = [number for number, line in enumerate(lines) if re.match(r"\[\d/4\] failed: NonFinite", line)]
    begun = [number for number, line in enumerate(lines) if re.match(r"\[\d/4\] run ", line)]
    assert len(failures) == 2
    assert failures[0] < begun[-1]  # logged when it happens, not at the end


@pytest.mark.slow
def test_ctrl_c_saves_the_run_and_ends_the_sweep(launch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    sweep = ("-m", "algorithm=erm,grad_surgery", *SMALL)
    process = launch.start(*sweep, "trainer.steps=100000", "trainer.eval_every=100000")
    while not any("step 1/" in path.read_text() for path in launch.runs_dir.glob("*/log.txt")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT
    assert "SIGINT: saving after this step" in errors
    assert "run the same command again to resume from the last checkpoint" in errors
    assert "Traceback" not in errors
    assert [status(path.parent)["state"] for path in launch.runs_dir.glob("*/status.json")] == ["stopped"]


def test_sweeping_over_presets_is_refused(launch_here):
    answer = launch_here("-m", "experiment=swad,domainbed_head")
    assert answer.returncode == 1
    assert "one `experiment=` per command" in answer.stderr


@pytest.mark.slow
def test_an_installed_wheel_works_outside_of_the_checkout(tmp_path):
    """`pip install .` into a folder: package, configs and digits are all in it, and it trains from elsewhere."""
    # A copy, because pip leaves build/ behind and would ship the contents of an old one.
    checkout = copy_checkout(tmp_path / "checkout")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", tmp_path / "site", "."]
    subprocess.run([*install], cwd=checkout, check=True, capture_output=True)
    packages = {path.name for path in (tmp_path / "site").iterdir() if path.suffix != ".dist-info"}
    assert packages == {"gsdg", "hydra_plugins", "bin"}
    assert (tmp_path / "site" / "gsdg" / "py.typed").is_file()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    place = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    command = [sys.executable, tmp_path / "site" / "bin" / "gsdg", "trainer.steps=1", *SMALL]
    answer = subprocess.run(command, **place)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "runs").is_dir()
    where = subprocess.run([sys.executable, "-c", "import gsdg; print(gsdg.__file__)"], **place)
    assert str(tmp_path) in where.stdout
