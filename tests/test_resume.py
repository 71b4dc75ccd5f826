"""kill -9 at random moments, then the same command again: records and weights equal an uninterrupted run's."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest
import torch
from helpers import Launcher, only_run, photos, records_without_time, status

from gsdg.runs import read_lines

RUN = (
    "split.target=15",
    "trainer.batch_size=4",
    "trainer.eval_every=13",
    "trainer.evaluate=fast",
    "trainer.steps=200",
    "trainer.checkpoint_every=4",
    "trainer.log_every=1",
    "device=cpu",
    "model.dropout=0.3",  # draws from the global generator: its state must be restored
    "optimizer.lr=1e-3",
)
# Colour photos, augmented in training and in the sources' evaluation: everything that is drawn.
PHOTOS = (
    "dataset=image_folder",
    "dataset.root=ROOT",
    "split.target=b",
    "trainer.augment=sources",
    "model=resnet18",
    "model.weights=null",
    "model.freeze_bn=false",
    "model.image_size=32",
    "trainer.steps=70",  # each takes longer, and so does each checkpoint
)


def steps_logged(runs_dir: Path) -> int:
    """How far the run has got, by its log."""
    logs = [path.read_text() for path in runs_dir.glob("*/log.txt")]
    return max([int(step) for log in logs for step in re.findall(r"step (\d+)/", log)], default=0)


def kill_at(launcher: Launcher, step: int, *overrides: str) -> None:
    """Start the run, SIGKILL it once it has logged `step`."""
    process = launcher.start(*overrides)
    while steps_logged(launcher.runs_dir) < step and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        ("algorithm=erm", "trainer.workers=0"),
        ("algorithm=grad_surgery", "trainer.workers=2", "algorithm.rule.order=random", "algorithm.alpha_schedule=log"),
        ("algorithm=gradvac", "trainer.workers=0", "algorithm.rule.beta=0.5", "algorithm.diagnostics=true"),
        ("trainer/averaging=ema", "trainer.workers=0", "trainer.steps=70"),
        ("trainer/averaging=swad", "trainer.workers=0", "trainer.steps=70", "trainer.eval_every=5"),
        ("algorithm=erm", "trainer.transform=exact", "trainer.workers=2", *PHOTOS),
        ("algorithm=grad_surgery", "trainer.transform=batched", *PHOTOS),
    ],
    ids=lambda variant: "-".join(variant[:2]),
)
def test_killed_three_times_a_run_ends_as_if_nothing_had_happened(tmp_path, variant):
    variant = [override.replace("ROOT", str(photos(tmp_path / "photos"))) for override in variant]
    whole, broken = Launcher(tmp_path / "whole"), Launcher(tmp_path / "broken")
    assert whole(*RUN, *variant).returncode == 0
    moments = sorted(random.sample(range(2, 30), 3))  # early: a run that is done before it is killed shows nothing
    print("killed at steps", moments)
    for moment in moments:
        kill_at(broken, moment, *RUN, *variant)
        assert status(only_run(broken.runs_dir))["state"] == "running"
    resumed = broken(*RUN, *variant)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stdout

    first, second = only_run(whole.runs_dir), only_run(broken.runs_dir)
    assert first.name == second.name
    assert status(second)["state"] == "done"
    assert records_without_time(first) == records_without_time(second)
    assert read_lines(first / "diagnostics.jsonl") == read_lines(second / "diagnostics.jsonl")
    averaged, repeated = (
        [{**row, "seconds": None} for row in read_lines(f / "averaged.jsonl")] for f in (first, second)
    )
    assert averaged == repeated
    assert bool(averaged) == ("averaging" in variant[0])
    for path in first.glob("model*.pt"):
        weights, again = (torch.load(folder / path.name, weights_only=True) for folder in (first, second))
        assert weights.keys() == again.keys()
        assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.slow
def test_the_same_command_again_says_done_and_force_runs_it_afresh(launch):
    run = (*RUN, "algorithm=erm", "trainer.workers=0", "trainer.steps=2")
    assert launch(*run).returncode == 0
    folder = only_run(launch.runs_dir)
    before = (folder / "records.jsonl").stat().st_mtime_ns
    again = launch(*run)
    assert "done already" in again.stdout
    assert (folder / "records.jsonl").stat().st_mtime_ns == before
    assert launch(*run, "force=true").returncode == 0
    assert (folder / "records.jsonl").stat().st_mtime_ns != before
    assert len(records_without_time(folder)) == 2
    assert len((folder / "environment.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_second_process_refuses_a_live_run(launch):
    run = (*RUN, "algorithm=erm", "trainer.workers=0", "trainer.steps=100000", "trainer.eval_every=100000")
    first = launch.start(*run)
    try:
        while steps_logged(launch.runs_dir) < 1:
            assert first.poll() is None
            time.sleep(0.05)
        second = launch(*run)
        assert second.returncode == 1
        assert "is being written by process" in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        first.kill()
        first.communicate()
