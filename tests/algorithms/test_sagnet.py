"""SagNet against its three updates, row by row."""

from __future__ import annotations

import pytest
import torch
from algorithm_cases import CLASSES, assert_same, batches, classifier, ready, seed_all, unequal_batches
from helpers import SMALL
from torch import Tensor

from gsdg.algorithms import SagNet
from gsdg.experiment import run
from gsdg.plan import prepare
from gsdg.step_metrics import NonFinite
from gsdg.surgery import NonFiniteGradient
from gsdg.types import join

EPS = 1e-5


def style(row: Tensor) -> tuple[Tensor, Tensor]:
    """[F] -> mean and unbiased variance."""
    mean = row.sum() / len(row)
    return mean, ((row - mean) ** 2).sum() / (len(row) - 1)


def drawn(features: Tensor) -> tuple[Tensor, Tensor]:
    return torch.rand(len(features), 1, dtype=features.dtype)[:, 0], torch.randperm(len(features))


def mixed(features: Tensor) -> Tensor:
    shares, others, rows = *drawn(features), []
    for i, row in enumerate(features):
        (mean, variance), (mean_j, variance_j), a = style(row), style(features[others[i]]), shares[i]
        content = (row - mean) / torch.sqrt(variance + EPS)
        variance = a * variance + (1 - a) * variance_j
        rows.append(content * torch.sqrt(variance + EPS) + a * mean + (1 - a) * mean_j)
    return torch.stack(rows)


def swapped(features: Tensor) -> Tensor:
    _, others = drawn(features)
    rows = []
    for i, row in enumerate(features):
        (mean, variance), other = style(row), features[others[i]].detach()
        mean_j, variance_j = style(other)
        rows.append((other - mean_j) / torch.sqrt(variance_j + EPS) * torch.sqrt(variance + EPS) + mean)
    return torch.stack(rows)


class Recording(torch.optim.SGD):
    """SGD that keeps the gradients of each of its steps, by name."""

    def __init__(self, algorithm, lr: float) -> None:
        super().__init__(algorithm.parameter_groups(), lr=lr)
        self.named, self.seen = dict(algorithm.named_parameters()), []

    def step(self) -> None:
        self.seen.append({name: p.grad.clone() for name, p in self.named.items() if p.grad is not None})
        super().step()


def stepped(algorithm, data, lr: float) -> tuple[Recording, dict[str, Tensor]]:
    optimizer = Recording(algorithm, lr)
    seed_all(5)
    algorithm.zero_grad(set_to_none=True)
    metrics = algorithm.backward(data)
    return optimizer, metrics | algorithm.step(optimizer)


def by_hand(data, weight: float, lr: float) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Gradients and losses of content, style and adversary, each after SGD steps on the losses before it."""
    twin, joint = ready(SagNet(adversary_weight=weight)), join(data)
    seed_all(5)

    def cross_entropy(logits):
        logs = logits - logits.exp().sum(1, keepdim=True).log()
        return -sum(logs[i, y] for i, y in enumerate(joint.labels)) / len(logits)

    def to_uniform(logits):
        logs = logits - logits.exp().sum(1, keepdim=True).log()
        return -weight * sum(logs[i, c] / CLASSES for i in range(len(logits)) for c in range(CLASSES)) / len(logits)

    def content():
        return cross_entropy(twin.model.head(mixed(twin.model.featurize(joint.images))))

    def style():
        return cross_entropy(twin.style_head(swapped(twin.model.featurize(joint.images))))

    def adversary():
        return to_uniform(twin.style_head(swapped(twin.model.featurize(joint.images))))

    steps, losses = [], []
    for loss_of, part in ((content, "model."), (style, "style_head."), (adversary, "model.featurizer.")):
        named = {name: p for name, p in twin.named_parameters() if name.startswith(part)}
        loss = loss_of()
        grads = torch.autograd.grad(loss, list(named.values()))
        with torch.no_grad():
            for p, grad in zip(named.values(), grads, strict=True):
                p -= lr * grad
        steps.append(dict(zip(named, grads, strict=True)))
        losses.append(loss.detach())
    return steps, losses


@pytest.mark.parametrize("weight", [0.8, 0.0])
def test_three_updates_each_of_its_part_at_the_weights_left_by_the_one_before(weight):
    """A weight of 0 leaves the third update out."""
    data = unequal_batches(4, 3, 4)
    optimizer, metrics = stepped(ready(SagNet(adversary_weight=weight)), data, lr=0.5)
    steps, losses = by_hand(data, weight=weight, lr=0.5)
    updates = 3 if weight else 2
    assert len(optimizer.seen) == updates
    for actual, expected in zip(optimizer.seen, steps[:updates], strict=True):
        assert_same(actual, expected)
    assert_same(metrics, dict(zip(("loss", "style", "adversary"), losses, strict=True)))
    assert not any(value.requires_grad for value in metrics.values())


def test_nothing_is_randomized_in_prediction():
    algorithm, images = ready(SagNet(adversary_weight=0.1)), batches()[0].images
    assert torch.equal(algorithm.predict(images), classifier()(images))


class InfiniteSlope(torch.autograd.Function):
    """The identity with an infinite gradient, which a finite loss does not reveal."""

    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def spoil(algorithm: SagNet, call: int) -> None:
    """Give the `call`-th of the style head's two uses in a step an infinite gradient."""
    calls = []

    def hook(module, inputs, logits):
        calls.append(None)
        return InfiniteSlope.apply(logits) if (len(calls) - 1) % 2 == call else logits

    algorithm.style_head.register_forward_hook(hook)


@pytest.mark.parametrize(("call", "source"), enumerate(["style", "adversary"]))
def test_a_later_gradient_that_is_not_finite_makes_no_step_or_one_with_zeros_where_reading_waits(call, source):
    data, algorithm = batches(), ready(SagNet(adversary_weight=0.8))
    spoil(algorithm, call)
    with pytest.raises(NonFiniteGradient, match=f"the gradient of the {source}'s loss holds NaN or inf"):
        stepped(algorithm, data, lr=0.1)
    assert all(p.isfinite().all() for p in algorithm.parameters())

    algorithm = ready(SagNet(adversary_weight=0.8))
    algorithm.later_steps._sync_is_free = False  # a mock: the real one needs a GPU
    assert algorithm.nonfinite_report() == ""
    spoil(algorithm, call)
    optimizer, _ = stepped(algorithm, data, lr=0.1)
    zeros = [all(not grad.any() for grad in grads.values()) for grads in optimizer.seen]
    assert zeros == [k == call + 1 for k in range(3)]
    reason = f"the gradient of the {source}'s loss holds NaN or inf: the optimizer step was made with zeros"
    assert algorithm.nonfinite_report().startswith(reason)


@pytest.mark.parametrize("case", ["gradient", "loss", "loss on an accelerator"])
def test_what_is_not_finite_in_a_later_step_stops_the_run_before_it_is_saved(compose, tmp_path, monkeypatch, case):
    setup = SagNet.setup

    def set_up(self, *args):
        setup(self, *args)
        self.later_steps._sync_is_free = case != "loss on an accelerator"
        if case == "gradient":
            spoil(self, 0)

    monkeypatch.setattr(SagNet, "setup", set_up)
    if case != "gradient":
        monkeypatch.setattr("gsdg.algorithms.sagnet.swap_contents", lambda features: features * torch.nan)
    with pytest.raises(NonFinite if "accelerator" in case else NonFiniteGradient, match="style"):
        run(prepare(compose(*SMALL, "algorithm=sagnet", "trainer.steps=3", "trainer.checkpoint_every=1")))
    assert not list(tmp_path.rglob("*.pt"))
