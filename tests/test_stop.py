"""A signal stops a run between two steps or in an evaluation. The resumed run ends like an uninterrupted one.

The signals are real and come at chosen moments: the code under test is made to send them to its own process.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR2

import pytest
import torch
from helpers import REPOSITORY, Launcher, assert_same, only_run, photos, records_without_time, status

import gsdg.runs.checkpoint
from gsdg.algorithms import ERM
from gsdg.analysis.tables import report
from gsdg.data.folders import ImageFolders
from gsdg.experiment import run
from gsdg.plan import Plan, prepare
from gsdg.runs.checkpoint import Checkpoints
from gsdg.runs.folder import RunFolder
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import read_lines
from gsdg.utils.stop_signals import Signals, Stopped

STEPS = 12
# A small network on a few colour photos. Training and the sources' evaluation are augmented, so that both use all RNGs;
# dropout uses the global generator. There are records of steps 0, 5, 10 and 11.
RUN = shlex.split(f"""
    dataset=image_folder split.target=b device=cpu algorithm=erm optimizer.lr=1e-3 model=convnet_2ch
    model.backbone.channels=3 model.mean=[0.5,0.5,0.5] model.std=[0.2,0.2,0.2] model.dropout=0.3
    trainer.augment=sources trainer.workers=0 trainer.batch_size=2 trainer.eval_batch_size=2 trainer.log_every=1
    trainer.eval_every=5 trainer.checkpoint_every=7 trainer.steps={STEPS} trainer.keep=last
""")
VARIANTS = [
    ("algorithm=erm",),
    ("algorithm=grad_surgery", "algorithm.rule.order=random", "algorithm.diagnostics=true"),
    ("trainer.workers=2",),
]


@pytest.fixture(autouse=True)
def interrupts_are_heard():
    """If the tests run in the background, SIGINT is ignored, also by the processes that they start."""
    before = signal.signal(SIGINT, signal.default_int_handler)
    yield
    signal.signal(SIGINT, before)


def child() -> Signals:
    """The signals that the process of a job handles."""
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
        """Restart the count, and send `numbers` before call number `call`."""
        self.calls, self.moments = 0, {call: lambda: [os.kill(os.getpid(), number) for number in numbers]}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return photos(tmp_path_factory.mktemp("images") / "photos", each=3, size=32)


@pytest.fixture
def plan(compose, images, tmp_path, monkeypatch):
    """A plan of RUN and more overrides, in the folder `place` of the test."""
    monkeypatch.setattr("gsdg.experiment.environment", dict)  # it would call git three times

    def plan(*more: str, place: str | Path = "runs") -> Plan:
        return prepare(compose(*RUN, f"dataset.root={images}", *more, f"runs_dir={tmp_path / place}"))

    plan()  # the first plan of a process tries a step of the optimizer, which `At` would count
    return plan


@pytest.fixture(scope="module")
def finished() -> dict[tuple[str, ...], Path]:
    """{overrides: the folder of an uninterrupted run}; `whole` fills it."""
    return {}


@pytest.fixture
def whole(plan, finished, tmp_path_factory):
    """The folder of an uninterrupted run."""

    def whole(*more: str) -> Path:
        if more not in finished:
            place = tmp_path_factory.mktemp("whole")
            run(plan(*more, place=place), signals=child())
            finished[more] = only_run(place)
        return finished[more]

    return whole


@pytest.fixture
def complete(plan, whole, tmp_path):
    """Run to the end, which must be that of an uninterrupted run."""

    def complete(*more: str, place: str = "runs") -> None:
        run(plan(*more, place=place), signals=child())
        assert_same(whole(*more), only_run(tmp_path / place))

    return complete


@pytest.fixture
def step(plan, monkeypatch) -> At:
    """The updates of the weights."""
    return At(monkeypatch, torch.optim.Adam, "step")


@pytest.fixture
def predict(plan, monkeypatch) -> At:
    """The predictions of the batches of an evaluation."""
    return At(monkeypatch, ERM, "predict")


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_a_run_stopped_at_the_first_at_random_and_at_late_steps_ends_like_an_uninterrupted_one(
    plan, step, complete, tmp_path, variant
):
    moments = [0, 1, *sorted(random.sample(range(2, STEPS - 1), 2)), STEPS - 1]
    for start, done in pairwise(moments):
        step.send(done - start - 1, SIGUSR2)
        assert stopped(plan(*variant)).message == f"saved after {done} of {STEPS} steps"
        left = status(only_run(tmp_path / "runs"))
        assert (left["state"], left["step"]) == ("stopped", done)
        assert step.calls == done - start, "it went on after the step"
    complete(*variant)


@pytest.mark.parametrize("variant", [VARIANTS[0], pytest.param(VARIANTS[2], marks=pytest.mark.slow)], ids="-".join)
def test_an_interrupted_evaluation_is_repeated(monkeypatch, plan, tmp_path, variant):
    """The model uses random numbers in evaluation; the repeated evaluation uses the same ones."""
    predicted = ERM.predict
    monkeypatch.setattr(ERM, "predict", lambda self, images: predicted(self, images) + torch.rand(()))
    predict = At(monkeypatch, ERM, "predict")
    run(plan(*variant, place="whole"), signals=child())
    batches = predict.calls // 4
    assert batches > 3
    for evaluation, done, recorded in ((0, 1, []), (1, 6, [0]), (3, STEPS, [0, 5, 10])):
        place = f"evaluation{evaluation}"
        for call in (evaluation * batches + 1, batches - 1, 0):  # at the last two only this evaluation is left
            predict.send(call, SIGUSR2)
            assert stopped(plan(*variant, place=place)).message == f"saved after {done} of {STEPS} steps"
            assert predict.calls == call + 1, "it went on after the batch"
            lines = read_lines(only_run(tmp_path / place) / "records.jsonl")  # no such file before the first record
            assert [line["step"] for line in lines] == recorded
        run(plan(*variant, place=place), signals=child())
        assert_same(only_run(tmp_path / "whole"), only_run(tmp_path / place))


def test_a_signal_to_save_makes_a_checkpoint_and_the_run_goes_on(monkeypatch, plan, step, predict, complete):
    """As when SLURM sends SIGTERM some time before SIGKILL: whenever SIGKILL comes after that, little is lost."""
    saved, save = [], Checkpoints.save

    def note(self, done, state):
        saved.append((done, state["unrecorded"]))
        save(self, done, state)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", note)
        step.send(3, SIGTERM, SIGTERM)
        predict.send(2, SIGTERM)  # in the evaluation of step 0
        run(plan(), signals=child())
    assert saved == [(1, True), (4, False), (7, False), (STEPS, False)]
    complete()


def test_a_run_killed_after_an_evaluation_in_which_it_saved_records_it_once(plan, step, predict, complete, tmp_path):
    predict.send(2, SIGTERM)
    step.moments = {3: lambda: os._exit(9)}
    pid = os.fork()
    if not pid:
        run(plan(), signals=child())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    folder = only_run(tmp_path / "runs")
    assert [record["step"] for record in records_without_time(folder)] == [0]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000001.pt"]
    predict.moments, step.moments = {}, {}
    complete()


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(monkeypatch, plan, complete):
    save = At(monkeypatch, gsdg.runs.checkpoint.torch, "save")
    save.send(0, SIGUSR2, SIGTERM)
    assert stopped(plan()).message == f"saved after 8 of {STEPS} steps"  # it saved after 7 steps
    complete()
    save.send(1, SIGUSR2, SIGTERM)  # after the last step, with which the run is done
    complete(place="last")


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def test_the_steps_since_the_last_whole_checkpoint_are_repeated_and_without_one_the_run_is_refused_until_it_is_forced(
    plan, step, complete, tmp_path
):
    for place in ("last", "all"):
        step.send(8, SIGUSR2)
        stopped(plan(place=place))
        folder = only_run(tmp_path / place)
        checkpoints = sorted((folder / "checkpoints").iterdir())
        assert [path.name for path in checkpoints] == ["step_00000007.pt", "step_00000009.pt"]
        damage(checkpoints[1])
        if place == "last":
            complete(place=place)
            assert "is damaged: " in (folder / "log.txt").read_text()
    damage(checkpoints[0])
    before = (folder / "records.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(UserError, match="every checkpoint of run .* is damaged"):
            run(plan(place=place), signals=child())
        assert (folder / "records.jsonl").read_bytes() == before
        assert status(folder)["state"] == "failed"
        assert status(folder)["reason"].startswith("UserError: every checkpoint of run")
    run(plan("force=true", place=place), signals=child())
    complete(place=place)


def test_a_signal_at_the_last_step_does_not_stop_the_run(plan, step, complete):
    step.send(STEPS - 1, SIGUSR2)
    run(plan("trainer.evaluate_last=false"), signals=child())
    complete("trainer.evaluate_last=false")


def test_the_first_ctrl_c_saves_and_the_second_stops_at_once(plan, step, complete, tmp_path):
    step.send(9, SIGINT, SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(plan())
    left = status(only_run(tmp_path / "runs"))
    assert left["state"] == "stopped"
    assert "the run resumes from its last checkpoint" in left["reason"]
    complete()


def test_a_signal_while_data_is_read_stops_at_once_with_a_message(monkeypatch, plan, tmp_path):
    monkeypatch.setattr(ImageFolders, "read", lambda self: (os.kill(os.getpid(), SIGTERM), time.sleep(60)))
    with pytest.raises(SystemExit) as ending:
        run(plan())
    assert ending.value.code == 128 + SIGTERM
    left = status(only_run(tmp_path / "runs"))
    assert left["state"] == "stopped"
    assert re.match("SIGTERM on .*nothing had to be saved", left["reason"])
    assert not (only_run(tmp_path / "runs") / "lock").exists()


def test_a_library_that_exits_is_a_failure_unless_it_exits_because_of_a_signal(monkeypatch, plan, tmp_path):
    """submitit's own handler, under its own launcher, exits with -1."""
    for code, state in {"no licence": "failed", 1: "failed", -1: "stopped", 143: "stopped"}.items():
        monkeypatch.setattr(ImageFolders, "read", lambda self, code=code: sys.exit(code))
        with pytest.raises(SystemExit):
            run(plan())
        left = status(only_run(tmp_path / "runs"))
        assert left["state"] == state, code
        assert left["reason"].startswith(f"SystemExit: {code}" if state == "failed" else "SystemExit on "), code


def test_a_failure_is_recorded_whatever_signal_comes_meanwhile(monkeypatch, plan, tmp_path):
    set_status = RunFolder.set_status

    def interrupted(self, **changes):
        if changes.get("state") == "failed":
            os.kill(os.getpid(), SIGTERM)
        set_status(self, **changes)

    monkeypatch.setattr(ImageFolders, "read", lambda self: 1 / 0)
    monkeypatch.setattr(RunFolder, "set_status", interrupted)
    with pytest.raises(ZeroDivisionError):
        run(plan())
    left = status(only_run(tmp_path / "runs"))
    assert (left["state"], left["reason"]) == ("failed", "ZeroDivisionError: division by zero")


def test_a_stop_is_in_the_list_of_runs(monkeypatch, plan, step, tmp_path, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    step.send(7, SIGUSR2)
    stopped(plan())
    log = (only_run(tmp_path / "runs") / "log.txt").read_text()
    assert "stopped: SIGUSR2 on n3: saved after 8 of 12 steps" in log
    assert "Traceback" not in log
    assert "stopped at step 8 of 12: SIGUSR2 on n3: saved after 8 of 12 steps" in report(tmp_path / "runs")


def test_the_seconds_of_a_step_survive_a_stop_in_an_evaluation(monkeypatch, plan, step, predict, tmp_path):
    clock, passed = time.perf_counter, []
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(passed))
    step.moments = {0: lambda: passed.append(100.0)}
    predict.moments = {0: lambda: (passed.append(10_000.0), os.kill(os.getpid(), SIGUSR2))}
    stopped(plan())
    run(plan(), signals=child())
    first = read_lines(only_run(tmp_path / "runs") / "records.jsonl")[0]
    assert 100.0 < first["seconds"]["step"] < 10_000.0


@pytest.mark.slow
def test_a_run_whose_workers_get_the_signal_too_ends_like_an_uninterrupted_one(plan, whole, images, tmp_path):
    """SLURM may signal the data loader workers too, and a user's Ctrl-C reaches them as well."""
    more = ("trainer.workers=2", "trainer.steps=250", "trainer.checkpoint_every=250")
    broken, expected = Launcher(tmp_path / "broken"), whole(*more)
    overrides = (*RUN, f"dataset.root={images}", *more)
    for number, earliest in ((SIGTERM, 1), (SIGUSR2, 60), (SIGINT, 120)):
        process = alone(broken, *overrides)
        log, wanted = "", earliest + random.randint(0, 40)  # of 250 steps: later the run may be done before the signal
        while f"step {wanted}/" not in log and process.poll() is None:
            time.sleep(0.005)
            log = "".join(path.read_text() for path in broken.runs_dir.glob("*/log.txt"))
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 128 + number, errors
        assert "Traceback" not in errors
        folder = only_run(broken.runs_dir)
        assert re.fullmatch(rf"{number.name} on .*: saved after \d+ of 250 steps", status(folder)["reason"])
    assert broken(*overrides).returncode == 0
    assert (folder / "log.txt").read_text().count("resuming at step") == 3
    assert_same(expected, folder)


def alone(launcher: Launcher, *overrides: str) -> subprocess.Popen:
    """A launch in its own process group, so that it can be signalled with its workers, but without this test."""
    command = [sys.executable, str(REPOSITORY / "launch.py"), *overrides, f"runs_dir={launcher.runs_dir}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=launcher.environment, start_new_session=True, **pipes)
