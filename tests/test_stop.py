"""A signal stops a run between two steps or in an evaluation; resumed, it ends as if nothing had happened.

The signals are real and come at chosen moments: the code under test is made to send them to its own process.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR2

import pytest
import torch
from helpers import REPOSITORY, Launcher, only_run, photos, records_without_time, status

import gsdg.checkpoint
from analysis.tables import report
from gsdg.algorithms import ERM
from gsdg.data.folders import ImageFolders
from gsdg.experiment import Plan, prepare, run
from gsdg.runs import RunFolder, read_lines
from gsdg.signals import Signals, Stopped

STEPS = 12
# A small network on a few colour photos, augmented in training and in the sources' evaluation: everything is drawn.
RUN = (
    "dataset=image_folder",
    "split.target=b",
    "model=convnet_2ch",
    "model.backbone.channels=3",
    "model.mean=[0.5,0.5,0.5]",
    "model.std=[0.2,0.2,0.2]",
    "model.dropout=0.3",  # draws from the global generator
    "algorithm=erm",
    "optimizer.lr=1e-3",
    "trainer.augment=sources",
    "trainer.workers=0",
    "trainer.batch_size=2",
    "trainer.eval_batch_size=2",
    "trainer.eval_every=5",  # records of steps 0, 5, 10, 11
    "trainer.checkpoint_every=7",
    "trainer.log_every=1",
    f"trainer.steps={STEPS}",
    "device=cpu",
)
VARIANTS = [
    ("algorithm=erm",),
    ("algorithm=grad_surgery", "algorithm.rule.order=random", "algorithm.diagnostics=true"),
    ("trainer.workers=2",),
]


@pytest.fixture(autouse=True)
def interrupts_are_heard():
    """Where the tests run in the background, SIGINT is ignored, and by what they start too."""
    before = signal.signal(SIGINT, signal.default_int_handler)
    yield
    signal.signal(SIGINT, before)


def child() -> Signals:
    """What a job's process listens to."""
    return Signals(stop=(SIGUSR2, SIGINT), save=(SIGTERM,))


def stopped(plan: Plan) -> Stopped:
    with pytest.raises(Stopped) as caught:
        run(plan, signals=child())
    return caught.value


class At:
    """Calls `then` before the calls of a function with the given numbers, counted from 0."""

    def __init__(self, monkeypatch, owner: object, name: str) -> None:
        self.moments: dict[int, Callable[[], None]] = {}
        self.calls, inner = 0, getattr(owner, name)

        def watched(*args, **kwargs):
            then, self.calls = self.moments.pop(self.calls, None), self.calls + 1
            if then:
                then()
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    def send(self, call: int, *numbers: int) -> None:
        """From now on, count anew; send `numbers` at that call."""
        self.calls, self.moments = 0, {call: lambda: [os.kill(os.getpid(), number) for number in numbers]}


@pytest.fixture
def plan(compose, tmp_path, monkeypatch):
    """A plan of RUN and more, with its runs in a folder of its own."""
    monkeypatch.setattr("gsdg.experiment.environment", dict)  # asks git three times
    root = photos(tmp_path / "photos", each=3, size=32)

    def plan(place: str, *more: str) -> Plan:
        return prepare(compose(*RUN, f"dataset.root={root}", *more, f"runs_dir={tmp_path / place}"))

    return plan


@pytest.fixture
def whole(plan, tmp_path):
    """The folder of a run that nothing disturbed."""

    def whole(*more: str) -> Path:
        run(plan("whole", *more), signals=child())
        return only_run(tmp_path / "whole")

    return whole


def assert_same(first: Path, second: Path, steps: int = STEPS) -> None:
    assert first.name == second.name
    assert status(second)["state"] == "done"
    assert status(second)["step"] == steps
    assert records_without_time(first) == records_without_time(second)
    assert read_lines(first / "diagnostics.jsonl") == read_lines(second / "diagnostics.jsonl")
    weights, again = (torch.load(folder / "model.pt", weights_only=True) for folder in (first, second))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not (second / "checkpoints").exists()


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_stopped_at_the_first_at_random_and_at_late_steps_a_run_ends_as_if_nothing_had_happened(
    monkeypatch, plan, whole, tmp_path, variant
):
    one, two = sorted(random.sample(range(2, STEPS - 1), 2))
    expected = whole(*variant)
    update = At(monkeypatch, torch.optim.Adam, "step")
    for start, done in ((0, 1), (1, one), (one, two), (two, STEPS - 1)):
        update.send(done - start - 1, SIGUSR2)
        assert stopped(plan("broken", *variant)).said == f"saved after {done} of {STEPS} steps"
        left = status(only_run(tmp_path / "broken"))
        assert (left["state"], left["step"]) == ("stopped", done)
        assert update.calls == done - start, "it went on after the step"
    run(plan("broken", *variant), signals=child())
    assert_same(expected, only_run(tmp_path / "broken"))


@pytest.mark.parametrize("variant", [VARIANTS[0], pytest.param(VARIANTS[2], marks=pytest.mark.slow)], ids="-".join)
def test_an_evaluation_is_cut_short_and_made_again(monkeypatch, plan, whole, tmp_path, variant):
    """Its model draws while it is evaluated, as one that samples would: the draws are made again as they were."""
    predicted = ERM.predict
    monkeypatch.setattr(ERM, "predict", lambda self, images: predicted(self, images) + torch.rand(()))
    predict = At(monkeypatch, ERM, "predict")
    expected = whole(*variant)
    batches = predict.calls // 4
    assert batches > 3
    for evaluation, done, recorded in ((0, 1, []), (1, 6, [0]), (3, STEPS, [0, 5, 10])):
        place = f"evaluation{evaluation}"
        for call in (evaluation * batches + 1, batches - 1, 0):  # the last two find only this evaluation to be made
            predict.send(call, SIGUSR2)
            assert stopped(plan(place, *variant)).said == f"saved after {done} of {STEPS} steps"
            assert predict.calls == call + 1, "it went on after the batch"
            lines = read_lines(only_run(tmp_path / place) / "records.jsonl")
            assert [line["step"] for line in lines] == recorded
        run(plan(place, *variant), signals=child())
        assert_same(expected, only_run(tmp_path / place))


def test_asked_to_save_it_saves_and_goes_on(monkeypatch, plan, whole, tmp_path):
    """As when SLURM sends SIGTERM some time before SIGKILL: killed at whatever moment after it, little is lost."""
    expected = whole()
    step, predict = At(monkeypatch, torch.optim.Adam, "step"), At(monkeypatch, ERM, "predict")
    saved = []
    save = gsdg.checkpoint.Checkpoints.save
    monkeypatch.setattr(
        gsdg.checkpoint.Checkpoints,
        "save",
        lambda self, done, state: (saved.append((done, state["unrecorded"])), save(self, done, state)),
    )
    step.send(3, SIGTERM, SIGTERM)
    predict.send(2, SIGTERM)  # in the evaluation of step 0
    run(plan("saved"), signals=child())
    assert saved == [(1, True), (4, False), (7, False), (STEPS, False)]
    assert_same(expected, only_run(tmp_path / "saved"))


def test_killed_after_an_evaluation_for_which_it_had_saved_it_makes_no_record_twice(monkeypatch, plan, whole, tmp_path):
    expected = whole()
    step, predict = At(monkeypatch, torch.optim.Adam, "step"), At(monkeypatch, ERM, "predict")
    predict.send(2, SIGTERM)
    step.moments = {3: lambda: os._exit(9)}
    pid = os.fork()
    if not pid:
        run(plan("killed"), signals=child())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    folder = only_run(tmp_path / "killed")
    assert [record["step"] for record in records_without_time(folder)] == [0]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000001.pt"]
    predict.moments, step.moments = {}, {}
    run(plan("killed"), signals=child())
    assert_same(expected, folder)


@pytest.mark.parametrize("call", [0, 1])
def test_a_signal_while_a_checkpoint_is_written_waits_for_it(monkeypatch, plan, whole, tmp_path, call):
    expected = whole()
    At(monkeypatch, gsdg.checkpoint.torch, "save").send(call, SIGUSR2, SIGTERM)
    done = (8, None)[call]  # saved after 7 steps, and after the last, with which it is done
    if done:
        assert stopped(plan("broken")).said == f"saved after {done} of {STEPS} steps"
    run(plan("broken"), signals=child())
    assert_same(expected, only_run(tmp_path / "broken"))


def test_at_the_last_step_there_is_nothing_to_stop(monkeypatch, plan, whole, tmp_path):
    expected = whole("trainer.evaluate_last=false")
    At(monkeypatch, torch.optim.Adam, "step").send(STEPS - 1, SIGUSR2)
    run(plan("last", "trainer.evaluate_last=false"), signals=child())
    assert_same(expected, only_run(tmp_path / "last"))


def test_the_first_of_two_ctrl_c_saves_the_second_is_obeyed_at_once(monkeypatch, plan, whole, tmp_path):
    expected = whole()
    At(monkeypatch, torch.optim.Adam, "step").send(9, SIGINT, SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(plan("broken"))
    folder = only_run(tmp_path / "broken")
    assert status(folder)["state"] == "stopped"
    assert "goes on from its last checkpoint" in status(folder)["reason"]
    run(plan("broken"))
    assert_same(expected, folder)


def test_a_stop_while_data_is_read_is_obeyed_at_once_and_told(monkeypatch, plan, tmp_path):
    def read(self):
        os.kill(os.getpid(), SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(ImageFolders, "read", read)
    with pytest.raises(SystemExit) as ending:
        run(plan("early"))
    assert ending.value.code == 128 + SIGTERM
    left = status(only_run(tmp_path / "early"))
    assert left["state"] == "stopped"
    assert left["reason"].startswith("SIGTERM on ")
    assert "nothing had to be saved" in left["reason"]
    assert not (only_run(tmp_path / "early") / "lock").exists()


@pytest.mark.parametrize(
    ("code", "state"), [("no licence", "failed"), (1, "failed"), (-1, "stopped"), (143, "stopped")]
)
def test_a_library_that_exits_is_a_failure_unless_it_does_so_for_a_signal(monkeypatch, plan, tmp_path, code, state):
    """submitit's own handler, under its own launcher, exits with -1."""
    monkeypatch.setattr(ImageFolders, "read", lambda self: sys.exit(code))
    with pytest.raises(SystemExit):
        run(plan("exits"))
    left = status(only_run(tmp_path / "exits"))
    assert left["state"] == state
    assert left["reason"].startswith(f"SystemExit: {code}" if state == "failed" else "SystemExit on ")


def test_a_failure_is_written_down_whatever_signal_comes_meanwhile(monkeypatch, plan, tmp_path):
    def fail(self):
        raise RuntimeError("the disk is upside down")

    set_status = RunFolder.set_status

    def interrupted(self, **changes):
        if changes.get("state") == "failed":
            os.kill(os.getpid(), SIGTERM)
        set_status(self, **changes)

    monkeypatch.setattr(ImageFolders, "read", fail)
    monkeypatch.setattr(RunFolder, "set_status", interrupted)
    with pytest.raises(RuntimeError, match="upside down"):
        run(plan("fails"))
    left = status(only_run(tmp_path / "fails"))
    assert (left["state"], left["reason"]) == ("failed", "RuntimeError: the disk is upside down")


def test_a_stop_is_noted_where_runs_are_listed(monkeypatch, plan, tmp_path, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    At(monkeypatch, torch.optim.Adam, "step").send(7, SIGUSR2)
    stopped(plan("runs"))
    log = (only_run(tmp_path / "runs") / "log.txt").read_text()
    assert "stopped: SIGUSR2 on n3: saved after 8 of 12 steps" in log
    assert "Traceback" not in log
    assert "stopped at step 8 of 12: SIGUSR2 on n3: saved after 8 of 12 steps" in report(tmp_path / "runs")


def test_the_seconds_of_a_step_survive_a_stop_in_an_evaluation(monkeypatch, plan, tmp_path):
    step, predict = At(monkeypatch, torch.optim.Adam, "step"), At(monkeypatch, ERM, "predict")
    step.moments = {0: lambda: time.sleep(0.3)}
    predict.send(0, SIGUSR2)
    predict.moments[0] = lambda kill=predict.moments[0]: (time.sleep(6.0), kill())
    stopped(plan("runs"))
    run(plan("runs"), signals=child())
    first = read_lines(only_run(tmp_path / "runs") / "records.jsonl")[0]
    assert 0.3 < first["seconds"]["step"] < 6.0


@pytest.mark.slow
@pytest.mark.parametrize("number", [SIGTERM, SIGUSR2, SIGINT])
def test_a_process_tree_that_is_signalled_as_a_whole_ends_as_if_nothing_had_happened(tmp_path, number):
    """SLURM may send what it sends to the loaders too; a user's Ctrl-C reaches them as well."""
    images = photos(tmp_path / "photos", each=3, size=32)
    overrides = (
        *RUN,
        f"dataset.root={images}",
        "trainer.workers=2",
        "trainer.steps=250",
        "trainer.checkpoint_every=250",
    )
    whole, broken = Launcher(tmp_path / "whole"), Launcher(tmp_path / "broken")
    assert whole(*overrides).returncode == 0
    process = alone(broken, *overrides)
    seen, wanted = "", random.randint(1, 50)  # of 250: later it may be done before the signal
    while f"step {wanted}/" not in seen and process.poll() is None:
        time.sleep(0.005)
        seen = "".join(path.read_text() for path in broken.runs_dir.glob("*/log.txt"))
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    folder = only_run(broken.runs_dir)
    assert re.fullmatch(rf"{number.name} on .*: saved after \d+ of 250 steps", status(folder)["reason"])
    assert broken(*overrides).returncode == 0
    assert "resuming at step" in (folder / "log.txt").read_text()
    assert_same(only_run(whole.runs_dir), folder, steps=250)


def alone(launcher: Launcher, *overrides: str) -> subprocess.Popen:
    """A launch in a process group of its own, so that it can be signalled with its loaders and without this test."""
    command = [sys.executable, str(REPOSITORY / "launch.py"), *overrides, f"runs_dir={launcher.runs_dir}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=launcher.environment, start_new_session=True, **pipes)
