"""kill -9 at random moments, then the same command again: records and weights equal an uninterrupted run's."""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import string
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import Launcher, assert_same, only_run, photos, records_without_time, status, write_list

from gsdg.experiment import run
from gsdg.plan import Plan, prepare
from gsdg.utils.json_files import read_lines

RUN = shlex.split("""
    split.target=15 trainer.batch_size=4 trainer.eval_every=13 trainer.evaluate=fast trainer.steps=200
    trainer.checkpoint_every=4 trainer.log_every=1 device=cpu model.dropout=0.3 optimizer.lr=1e-3
""")  # dropout uses the global generator, whose state must be restored
# Colour photos. Training and the sources' evaluation are augmented, so that both use all RNGs. Fewer steps, because
# steps and checkpoints take longer.
PHOTOS = shlex.split("""
    dataset=image_folder dataset.root=ROOT split.target=b trainer.augment=sources trainer.steps=70 model=resnet18
    model.weights=null model.freeze_bn=false model.image_size=32
""")


def steps_logged(runs_dir: Path) -> int:
    """The last step in the log of the run."""
    logs = [path.read_text() for path in runs_dir.glob("*/log.txt")]
    return max([int(step) for log in logs for step in re.findall(r"step (\d+)/", log)], default=0)


# The head first, a frozen layer, learning rates of its own for each group, all on a schedule.
PARTS = (
    "trainer/scheduler=cosine",
    "trainer.scheduler.warmup_steps=9",
    "trainer.clip_norm=0.5",
    "algorithm=grad_surgery",
    "trainer.head_only_steps=13",
    "model.freeze=[featurizer.0.*]",
    "model.head=cosine",
    "optimizer.groups=[{match: [head], lr: 10}, {match: [norm,bias], weight_decay: 0.1}]",
)
SMALL_DIGITS = ("trainer.batch_size=2", "trainer.eval_every=29", "split.holdout_fraction=0.9")  # float16 is slow here
VARIANTS = [
    ("algorithm=erm", "trainer.workers=0"),
    ("algorithm=gradvac", "trainer.workers=0", "algorithm.rule.beta=0.5", "algorithm.diagnostics=true"),
    ("trainer/averaging=ema", "trainer.workers=0", "trainer.steps=70"),
    ("trainer/averaging=swad", "trainer.workers=0", "trainer.steps=70", "trainer.eval_every=5"),
    ("trainer/averaging=ema", "trainer.workers=0", "trainer.steps=70", *PARTS),
    ("algorithm=grad_surgery", "trainer.workers=2", "trainer.domains_per_step=2", "trainer.domain_sampling=size"),
    ("algorithm=cdann", "trainer.workers=0", "split.uda_fraction=0.5"),
    ("algorithm=pseudo_label", "trainer.workers=0", "split.uda_fraction=0.5", "algorithm.ramp_steps=30"),
    ("algorithm=grad_surgery", "trainer.workers=0", "trainer.precision=fp16", "trainer.steps=30", *SMALL_DIGITS),
    ("algorithm=erm", "trainer.transform=exact", "trainer.workers=2", *PHOTOS),
    ("algorithm=grad_surgery", "trainer.transform=batched", *PHOTOS),
]
SLIDES = shlex.split("""
    split.target=[e,E] trainer.domains_per_step=4 trainer.batch_size=4 trainer.steps=30 trainer.eval_every=12
    trainer.checkpoint_every=4 trainer.workers=0 model=resnet18 model.weights=null model.freeze_bn=false
    model.image_size=32 device=cpu
""")
RANDOM_ORDER = ("algorithm=grad_surgery", "algorithm.rule.order=random", "algorithm.alpha_schedule=log")


def run_until_killed(plan: Plan) -> None:
    """Run the plan in a new process that sends itself SIGKILL some milliseconds after one of its first steps."""
    pid = os.fork()
    if pid:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        return
    try:
        last, update, steps = random.randint(5, 14), torch.optim.Adam.step, []

        def counted(*args, **kwargs):
            steps.append(1)
            if len(steps) == last:
                threading.Timer(random.uniform(0, 0.02), os.kill, (os.getpid(), signal.SIGKILL)).start()
            return update(*args, **kwargs)

        torch.optim.Adam.step = counted
        run(plan)
    finally:
        os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant[:2]))
def test_a_run_killed_three_times_ends_like_an_uninterrupted_one(compose, tmp_path, caplog, variant):
    caplog.set_level("INFO")
    variant = [override.replace("ROOT", str(photos(tmp_path / "photos"))) for override in variant]
    whole, broken = (prepare(compose(*RUN, *variant, f"runs_dir={tmp_path / name}")) for name in ("whole", "broken"))
    run(whole)
    for _ in range(3):
        run_until_killed(broken)
        assert status(only_run(tmp_path / "broken"))["state"] == "running"
    run(broken)
    first, second = only_run(tmp_path / "whole"), only_run(tmp_path / "broken")
    assert "resuming at step" in (second / "log.txt").read_text()
    assert bool(read_lines(first / "averaged.jsonl")) == ("averaging" in variant[0])
    assert_same(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["erm", "grad_surgery"])
def test_four_of_forty_domains_per_step_killed_and_resumed(compose, tmp_path, name):
    """Forty slides of a hospital each, as in Camelyon17, with the list's own split."""
    root = photos(tmp_path / "slides", domains=string.ascii_letters[:40], each=4, size=24)
    file = write_list(root / "slides.csv", parts=lambda i, n: "out" if i == n - 1 else "in")
    overrides = [f"algorithm={name}", "dataset=list", f"dataset.file={file}", "split=from_list", *SLIDES]
    whole, broken = (prepare(compose(*overrides, f"runs_dir={tmp_path / place}")) for place in ("whole", "broken"))
    run(whole)
    run_until_killed(broken)
    run(broken)
    assert_same(only_run(tmp_path / "whole"), only_run(tmp_path / "broken"))
    assert len(records_without_time(only_run(tmp_path / "whole"))[0]["accuracy"]) == 40


@pytest.mark.slow
def test_the_command_killed_three_times_ends_like_an_uninterrupted_one(tmp_path):
    command = (*RUN, *RANDOM_ORDER, "trainer.workers=2")
    whole, broken = Launcher(tmp_path / "whole"), Launcher(tmp_path / "broken")
    uninterrupted = whole.start(*command)
    for moment in sorted(random.sample(range(2, 30), 3)):
        process = broken.start(*command)
        while steps_logged(broken.runs_dir) < moment and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert status(only_run(broken.runs_dir))["state"] == "running"
    resumed = broken(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stdout
    uninterrupted.communicate()
    assert_same(only_run(whole.runs_dir), only_run(broken.runs_dir))


def test_the_same_command_again_says_done_and_force_starts_from_scratch(launch_here, tmp_path):
    command = (*RUN, "algorithm=erm", "trainer.workers=0", "trainer.steps=2")
    assert launch_here(*command).returncode == 0
    folder = only_run(tmp_path / "runs")
    before = (folder / "records.jsonl").stat().st_mtime_ns
    assert "done already" in launch_here(*command).stdout
    assert (folder / "records.jsonl").stat().st_mtime_ns == before
    assert launch_here(*command, "force=true").returncode == 0
    assert (folder / "records.jsonl").stat().st_mtime_ns != before
    assert len(records_without_time(folder)) == 2
    assert len(read_lines(folder / "environment.jsonl")) == 1


@pytest.mark.slow
def test_a_second_process_refuses_a_live_run(launch, launch_here):
    command = (*RUN, "algorithm=erm", "trainer.workers=0", "trainer.steps=100000", "trainer.eval_every=100000")
    first = launch.start(*command)
    try:
        while steps_logged(launch.runs_dir) < 1:
            assert first.poll() is None
            time.sleep(0.05)
        second = launch_here(*command, f"runs_dir={launch.runs_dir}")
        assert second.returncode == 1
        assert "is being written by process" in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        first.kill()
        first.communicate()
