"""trainer.precision=fp16: gradients after the division are those without a scale; a step that overflows is skipped."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import assert_same, batches, classifier, gradients, made, ready, refusal, seed_all
from config_choices import NEEDED, choices
from harness import compose_tiny, observe
from torch.amp import GradScaler

from gsdg.algorithms import ERM, Algorithm
from gsdg.loss_scaling import SMALLEST, LossScaling
from gsdg.plan import prepare
from gsdg.step_metrics import MetricMeans, NonFinite, gradient_norm

SCALED = sorted(name for name in choices("algorithm") if made(name).takes_loss_scaling)
SURGERY_OF_LOSSES = [(name, "algorithm/surgery=pcgrad") for name in ("groupdro", "sd")]


@pytest.mark.parametrize("words", [(name,) for name in SCALED] + SURGERY_OF_LOSSES, ids=" ".join)
def test_the_gradients_after_the_division_are_those_without_a_scale(words):
    """To rounding. A rule that sees scaled gradients, or a loss that is not scaled, is off by a factor of 2^16."""
    expected = gradients(ready(made(*words)), batches())
    scaled = ready(made(*words))
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1)
    scaling = LossScaling(scaled, torch.device("cpu"))
    gradients(scaled, batches())
    scaling.unscale(optimizer)
    found = {name: p.grad for name, p in scaled.model.named_parameters() if p.grad is not None}
    assert_same(found, expected, rtol=1e-9, atol=1e-12)


def test_every_other_algorithm_and_a_users_step_of_its_own_are_refused():
    others = set(choices("algorithm")) - set(SCALED)
    assert {"sam", "irm", "fish", "mldg", "dann"} <= others
    for name in others:
        choice = f"algorithm={name}"
        message = refusal(prepare, compose_tiny(choice, *NEEDED.get(choice, ()), **{"trainer.precision": "fp16"}))
        assert f"algorithm={name} computes gradients or updates of its own" in message
    for name in SCALED:
        assert type(made(name)).step is Algorithm.step, f"{name} changes the step, which the scaler would not call"


class Forgetful(ERM):
    def backward(self, data):
        F.cross_entropy(self.model(data[0].images), data[0].labels).backward()
        return {}


def test_an_algorithm_that_scales_no_loss_is_named():
    algorithm = ready(Forgetful())
    scaling = LossScaling(algorithm, torch.device("cpu"))
    algorithm.backward(batches())
    message = refusal(scaling.unscale, torch.optim.SGD(algorithm.parameters(), lr=0.1))
    assert "Forgetful.backward has scaled no loss" in message


def test_a_step_is_that_of_torchs_own_recipe():
    """Bit for bit: autocast, GradScaler, Adam, as in torch's documentation."""
    algorithm, model = (ready(made("erm"), dtype=torch.float32), classifier(torch.float32))
    algorithm.model.precision = "fp16"
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (algorithm.model, model)]
    scaling, scaler, data = LossScaling(algorithm, torch.device("cpu")), GradScaler("cpu"), batches(dtype=torch.float32)
    images, labels = torch.cat([b.images for b in data]), torch.cat([b.labels for b in data])
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        algorithm.backward(data)
        scaling.unscale(optimizers[0])
        scaling.step(optimizers[0], gradient_norm(list(algorithm.parameters())))
        with torch.autocast("cpu", torch.float16):
            features = model.featurizer(images)
        scaler.scale(F.cross_entropy(model.head(features.float()), labels)).backward()
        scaler.step(optimizers[1])
        scaler.update()
    assert_same(dict(algorithm.model.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)


# ---- in a run --------------------------------------------------------------------------------------------------------


def overflowing(*steps: int):
    """A hook for `observe`: at these steps, counted from 0, the gradient of the head is infinite."""

    def watch(algorithm) -> None:
        passes = []

        def spoil(gradient):
            passes.append(1)
            return gradient * float("inf") if len(passes) - 1 in steps else gradient

        algorithm.model.head.weight.register_hook(spoil)

    return watch


@pytest.mark.parametrize("name", ["erm", "grad_surgery"])
def test_a_step_that_overflows_is_skipped_the_scale_is_halved_and_training_goes_on(name, monkeypatch):
    scales, check = [], LossScaling.check
    monkeypatch.setattr(
        LossScaling, "check", lambda self, step: scales.append(self.scaler.get_scale()) or check(self, step)
    )
    weights, passes = [], 3 if name == "grad_surgery" else 1  # one backward pass per domain

    def watch(algorithm) -> None:
        overflowing(passes)(algorithm)  # the second step
        algorithm.model.head.register_forward_pre_hook(
            lambda head, inputs: weights.append(head.weight.detach().clone()) if head.training else None
        )

    settings = {"trainer.precision": "fp16", "trainer.steps": 4, "trainer.eval_every": 3}
    run = observe(f"algorithm={name}", at_start=watch, **settings)
    first, second, third, fourth = weights[::passes]
    assert not torch.equal(first, second)
    assert torch.equal(second, third), "the second update is skipped"
    assert not torch.equal(third, fourth)
    assert scales == [2.0**16, 2.0**16, 2.0**15, 2.0**15]
    metrics = [line["metrics"] for line in run.lines()]
    assert [m["skipped"] for m in metrics] == pytest.approx([0, 1 / 3])
    assert all(0 < m["grad_norm"] < 100 for m in metrics)


@pytest.mark.filterwarnings("error")
def test_the_schedule_goes_on_in_a_skipped_step_without_a_warning_of_torch():
    words = ("trainer/scheduler=polynomial", "trainer.scheduler.warmup_steps=0", "trainer.eval_every=1")
    run = observe(*words, at_start=overflowing(0), **{"trainer.precision": "fp16"})
    metrics = [line["metrics"] for line in run.lines()]
    assert [m["skipped"] for m in metrics] == [1, 0, 0]
    assert [m["lr"] for m in metrics] == pytest.approx([0.01, 0.01 * 2 / 3, 0.01 / 3])


def test_the_mean_norm_is_that_of_the_updates_that_were_made():
    means = MetricMeans()
    for skipped, norm in [(0.0, 2.0), (1.0, 0.0), (0.0, 4.0)]:
        means.add({"skipped": torch.tensor(skipped), "grad_norm": torch.tensor(norm)})
    assert means.compute() == pytest.approx({"skipped": 1 / 3, "grad_norm": 3.0})


def test_a_loss_that_is_not_finite_ends_the_run_and_so_does_a_scale_that_has_become_useless():
    algorithm = ready(made("erm"))
    scaling = LossScaling(algorithm, torch.device("cpu"))
    algorithm.backward(batches())
    scaling.scaler.update(SMALLEST)
    scaling.check(0)
    scaling.scaler.update(SMALLEST / 2)
    with pytest.raises(NonFinite, match="gradients overflow at every step, and at step 8 the loss scale is 3.0e-08"):
        scaling.check(7)

    def watch(algorithm) -> None:
        algorithm.model.head.register_forward_hook(lambda head, inputs, logits: logits * float("nan"))

    with pytest.raises(NonFinite, match="loss is nan at step 1"):
        observe(at_start=watch, **{"trainer.precision": "fp16"})


def test_clipping_is_by_the_norm_after_the_division():
    seed_all()
    free, limited = (observe(**{"trainer.precision": "fp16", "trainer.clip_norm": limit}) for limit in (1e9, 0.01))
    norms = [run.lines()[0]["metrics"]["grad_norm"] for run in (free, limited)]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    last = [p.grad for p in limited.algorithm.parameters()]
    assert gradient_norm_of(last) == pytest.approx(0.01, rel=1e-4)


def gradient_norm_of(gradients) -> float:
    return torch.cat([g.flatten() for g in gradients]).norm().item()
