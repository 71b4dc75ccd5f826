"""The progress lines of the training loop, and what it accepts from an algorithm."""

from __future__ import annotations

import re

import torch
from algorithm_cases import refusal
from harness import compose_tiny, first_difference, observe
from helpers import status

from gsdg.plan import prepare
from gsdg.step_metrics import Throughput
from gsdg.utils.progress import clock_time

TINY_BACKBONE = {"_target_": "tiny_backbone.tiny", "_partial_": True}  # it has BatchNorm


def test_hours_do_not_wrap_after_a_day():
    times = {
        0: "00:00:00",
        59.9: "00:00:59",
        3661: "01:01:01",
        86399: "23:59:59",
        86400: "24:00:00",
        372000: "103:20:00",
    }
    assert {seconds: clock_time(seconds) for seconds in times} == times
    throughput = Throughput(15001)
    throughput.tick(1)
    throughput.exclude(-24.8)  # the step began 24.8 seconds ago
    left = re.search(r"(\d+):\d\d:\d\d left", throughput.line(0.5)).group(1)
    assert int(left) == 103


def test_a_users_step_may_return_nothing(train, monkeypatch):
    monkeypatch.setattr("gsdg.algorithms.ERM.step", lambda algorithm, optimizer: optimizer.step())
    assert status(train("algorithm=erm", "trainer.steps=2", "trainer.eval_every=1"))["state"] == "done"


def test_the_first_updates_change_the_head_only_and_the_average_is_made_of_them():
    """BatchNorm's statistics begin to move with the featurizer. The average goes over both phases."""
    settings = {"trainer.head_only_steps": 2, "trainer.steps": 4, "model.backbone": TINY_BACKBONE}
    run = observe("trainer/averaging=ema", "trainer.eval_every=1", "trainer.keep=last", **settings)
    for step, weights in enumerate(run.weights):
        same = {name for name, tensor in weights.items() if torch.equal(tensor, run.weights[0][name])}
        of_featurizer = {name for name in weights if name.startswith("model.featurizer.")}
        assert same == (of_featurizer if 0 < step <= 2 else {*weights} if step == 0 else set()), step
    moments = [int(run.optimizer.state[p]["step"]) for p in run.algorithm.parameters()]
    assert moments == [2, 2, 2, 2, 4, 4], (
        "Adam's state of the featurizer begins after the phase; the last two: the head"
    )
    mean = torch.load(run.folder / "model_averaged.pt", weights_only=True)
    assert not torch.equal(mean["featurizer.0.weight"], run.weights[0]["model.featurizer.0.weight"])
    assert [len(gradients) for gradients in run.gradients] == [6] * 4, "grad_norm is that of all gradients"


def test_without_the_phase_a_run_is_as_before():
    assert first_difference(observe(), observe(**{"trainer.head_only_steps": 0})) is None


def test_the_phase_is_shorter_than_the_run():
    for steps in (3, 7, -1):
        message = refusal(prepare, compose_tiny(**{"trainer.steps": 3, "trainer.head_only_steps": steps}))
        assert f"trainer.head_only_steps: found {steps}, expected 0 or more and less than trainer.steps=3" in message
        assert "model.train_only=head" in message
    for settings, part in [({"model.head": "none"}, "head"), ({"model.train_only": "head"}, "featurizer")]:
        config = compose_tiny(**settings, **{"trainer.head_only_steps": 1})
        assert f"no parameter of the {part} trains" in refusal(prepare, config)


def test_a_selection_that_fits_nothing_is_refused_before_data_loads():
    for settings, message in [
        (
            {"model.train_only": "heads"},
            "model.train_only: found 'heads' (str), expected all, head, attention, norm, b",
        ),
        ({"model.train_only": ["heads.*"]}, "model.train_only: 'heads.*' selects no parameter: the most similar names"),
        (
            {"model.train_only": "attention"},
            "'attention' selects no parameter: the network has no module called `attn`",
        ),
        ({"model.freeze": ["*"]}, "leave no parameter of the model to train"),
        ({"model.freeze": "head"}, "model.freeze: found 'head' (str), expected a list, such as [a, b]"),
        ({"model.train_only": "head", "algorithm": "mmd"}, "MMD penalises the distance between the features"),
    ]:
        overrides = [f"algorithm={name}"] if (name := settings.pop("algorithm", None)) else []
        assert message in refusal(prepare, compose_tiny(*overrides, **settings)), message


def test_a_users_model_need_not_know_what_trains_and_its_backbone_is_not_built_before_its_run():
    """It may not be possible to build it without its weights."""
    plan = prepare(compose_tiny(**{"model.backbone": TINY_BACKBONE}))
    assert {"train_only", "freeze"}.isdisjoint(plan.config["model"])
    prepare(compose_tiny(**{"model.backbone": TINY_BACKBONE, "model.freeze": ["unknown"], "model.weights": "none.pt"}))
