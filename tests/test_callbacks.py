"""Callbacks see what a run does, change nothing, and their state is in the checkpoints."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from signal import SIGTERM

import numpy as np
import pytest
import torch
from algorithm_cases import refusal
from harness import compose_tiny, first_difference, observe, observe_plan

from gsdg import callbacks as module
from gsdg.averaging import EMA
from gsdg.callbacks import Callback, Callbacks, WatchedRun
from gsdg.experiment import run
from gsdg.plan import prepare
from gsdg.utils.json_files import read_json, read_lines
from gsdg.utils.stop_signals import Signals, Stopped

EVENTS: list[tuple] = []  # what the callbacks of this file have seen
EVERY_STEP = ("trainer.eval_every=1", "trainer.log_every=2")


@pytest.fixture(autouse=True)
def nothing_seen():
    EVENTS.clear()


@pytest.fixture
def node(users_class) -> Callable[..., dict]:
    """The config of one callback, of a class in a module of the user."""
    return lambda kind, **settings: {"callbacks.mine": users_class(kind, **settings)}


class Notes(Callback):
    """Notes every hook."""

    def start(self, run, step):
        EVENTS.append(("start", step))

    def step(self, run, step, metrics):
        EVENTS.append(("step", step, float(metrics["loss"])))

    def evaluation(self, run, record):
        EVENTS.append(("evaluation", record["step"], record))

    def averaged(self, run, record):
        EVENTS.append(("averaged", record["step"], record))

    def diagnosis(self, run, diagnosis):
        EVENTS.append(("diagnosis", diagnosis["step"], diagnosis))

    def end(self, run, state):
        EVENTS.append(("end", state))


def test_every_hook_is_called_in_order_with_what_the_run_writes(node):
    words = ("algorithm=grad_surgery", "algorithm.diagnostics=true", "trainer/averaging=ema", *EVERY_STEP)
    watched = observe(*words, **node(Notes))
    of_step = ["step", "diagnosis", "evaluation", "averaged"]
    assert [event[:2] for event in EVENTS] == [
        ("start", 0),
        *((what, 0) for what in of_step),
        *((what, 1) for what in of_step if what != "diagnosis"),
        *((what, 2) for what in of_step),
        ("end", "done"),
    ]
    files = {"evaluation": "records.jsonl", "averaged": "averaged.jsonl", "diagnosis": "diagnostics.jsonl"}
    for what, name in files.items():
        assert [event[2] for event in EVENTS if event[0] == what] == read_lines(watched.folder / name)
    losses = [event[2] for event in EVENTS if event[0] == "step"]
    assert losses == pytest.approx([line["metrics"]["loss"] for line in watched.lines()])


class Sees(Callback):
    def evaluation(self, run, record):
        EVENTS.append((run.folder, run.config, run.algorithm))


def test_a_callback_sees_the_folder_the_config_and_the_algorithm(node):
    watched = observe(**node(Sees))
    ((folder, config, algorithm),) = EVENTS
    assert (folder, config) == (watched.folder, watched.plan.config)
    assert algorithm is watched.algorithm


class Draws(Callback):
    """Draws random numbers in every hook."""

    def start(self, run, *values):
        torch.rand(3), np.random.rand(3), random.random()

    step = evaluation = averaged = diagnosis = end = start


@pytest.mark.parametrize("words", [("model.dropout=0.3",), ("algorithm=mixup", "trainer/averaging=ema")], ids=str)
def test_a_callback_that_draws_random_numbers_changes_no_result(node, words):
    plain, watched = observe(*words, *EVERY_STEP), observe(*words, *EVERY_STEP, **node(Draws))
    assert plain.plan.run_id == watched.plan.run_id
    assert first_difference(plain, watched) is None
    assert all(torch.equal(plain.weights[-1][name], watched.weights[-1][name]) for name in plain.weights[-1])


def test_a_step_does_nothing_for_callbacks_without_that_hook(monkeypatch):
    callbacks = Callbacks({"a": Sees(), "b": Callback()}, WatchedRun(Path(), {}))
    monkeypatch.setattr(module, "random_states", lambda: pytest.fail("states are saved in every step"))
    callbacks.step(0, {})


# ---- failures ------------------------------------------------------------------------------------------------------


class Fails(Notes):
    def __init__(self, *, hook: str) -> None:
        def fail(*arguments):
            raise LookupError(f"my own mistake in {hook}")

        setattr(self, hook, fail)


class FailsInAStep(Notes):
    def step(self, run, step, metrics):
        raise LookupError("my own mistake in a step")


@pytest.mark.parametrize("hook", ["start", "evaluation", "end"])
def test_an_exception_of_the_users_code_ends_the_run_with_its_traceback(node, hook):
    plan = prepare(compose_tiny(**node(Fails, hook=hook)))
    with pytest.raises(LookupError, match=f"my own mistake in {hook}"):
        observe_plan(plan)
    folder = Path(plan.config["runs_dir"]) / plan.run_id
    status = read_json(folder / "status.json")
    assert (status["state"], status["reason"]) == ("failed", f"LookupError: my own mistake in {hook}")
    assert "tests/test_callbacks.py" in (folder / "log.txt").read_text()
    assert [event for event in EVENTS if event[0] == "end"] == [("end", "failed")] * (hook != "end")
    observe_plan(prepare({key: value for key, value in plan.config.items() if key != "callbacks"}))
    assert read_json(folder / "status.json")["state"] == "done"


def test_an_exception_in_a_step_ends_the_run(node):
    with pytest.raises(LookupError, match="in a step"):
        observe(**node(FailsInAStep))


def test_after_a_failed_end_the_others_end_too():
    """The first `end` raises; the training loop then calls `end` for what is left."""
    callbacks = Callbacks({"a": Fails(hook="end"), "b": Notes()}, WatchedRun(Path(), {}))
    callbacks.start(0)
    with pytest.raises(LookupError) as caught:
        callbacks.end()
    callbacks.end(caught.value)
    callbacks.end(caught.value)
    assert [event for event in EVENTS if event[0] == "end"] == [("end", "failed")]


class NoCallback:
    pass


def test_what_is_no_callback_is_refused(node):
    message = refusal(prepare, compose_tiny(**node(NoCallback)))
    assert message == "callbacks.mine: mine.NoCallback is no Callback. Derive it from gsdg.callbacks.Callback."
    assert "expected a node with a _target_" in refusal(prepare, compose_tiny(**{"callbacks.mine": 3}))
    assert "unknown key callbacks.mine.colour" in refusal(prepare, compose_tiny(**node(Notes, colour=1)))


# ---- stopping and resuming -----------------------------------------------------------------------------------------


class Counts(Notes):
    """Counts steps, and has a state."""

    def __init__(self, *, stop_at: int | None = None) -> None:
        self.steps, self.stop_at = 0, stop_at

    def step(self, run, step, metrics):
        self.steps += 1
        EVENTS.append(("count", step, self.steps))
        if step == self.stop_at:
            raise InterruptedError

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def test_the_state_of_a_callback_is_in_the_checkpoints(node):
    words = ("trainer.steps=6", "trainer.checkpoint_every=3")
    plan = prepare(compose_tiny(*words, **node(Counts, stop_at=4)))
    with pytest.raises(InterruptedError):
        observe_plan(plan)
    EVENTS.clear()
    observe_plan(prepare({**plan.config, "callbacks": {"mine": {"_target_": "mine.Counts"}}}))
    assert [event for event in EVENTS if event[0] in ("start", "count")] == [
        ("start", 3),
        *(("count", step, step + 1) for step in (3, 4, 5)),
    ]


def test_a_callback_that_is_added_or_left_out_later_changes_nothing_for_the_checkpoints():
    callbacks = Callbacks({"a": Counts(), "b": Callback()}, WatchedRun(Path(), {}))
    assert callbacks.have_state
    assert callbacks.state_dict() == {"a": {"steps": 0}}
    callbacks.load_state_dict({"a": {"steps": 5}, "gone": {}})
    assert callbacks.state_dict() == {"a": {"steps": 5}}
    callbacks.load_state_dict({})
    assert not Callbacks({"b": Callback()}).have_state


def test_an_evaluation_that_is_interrupted_is_seen_once(node, monkeypatch):
    """A signal comes while the averaged weights of step 1 are evaluated; the run saves, stops, and evaluates again."""
    words = ("trainer/averaging=ema", *EVERY_STEP)
    plan, signals = prepare(compose_tiny(*words, **node(Notes))), Signals()
    averaged, calls = EMA.averaged, []

    def interrupted(self, mean):
        calls.append(1)
        if len(calls) == 2:
            signals.stop = SIGTERM
        return averaged(self, mean)

    monkeypatch.setattr(EMA, "averaged", interrupted)
    monkeypatch.setattr("gsdg.experiment.environment", lambda config: {})
    with pytest.raises(Stopped):
        run(plan, signals=signals)
    assert EVENTS[-1] == ("end", "stopped")
    observe_plan(prepare(plan.config))
    assert EVENTS[-1] == ("end", "done")
    for what in ("step", "evaluation", "averaged"):
        assert [event[1] for event in EVENTS if event[0] == what] == [0, 1, 2], what
