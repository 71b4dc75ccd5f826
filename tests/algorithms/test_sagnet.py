"""SagNet against its three updates, row by row."""

from __future__ import annotations

import pytest
import torch
from algorithm_cases import CLASSES, assert_same, batches, classifier, ready, seed_all
from helpers import SMALL
from torch import Tensor

from gsdg.algorithms import SagNet
from gsdg.algorithms.sagnet import mix_styles, swap_contents
from gsdg.batch import join
from gsdg.errors import UserError
from gsdg.experiment import prepare, run
from gsdg.surgery import NonFiniteGradient
from gsdg.trainer import NonFinite

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


@pytest.mark.parametrize(("found", "expected"), [(mix_styles, mixed), (swap_contents, swapped)])
def test_content_and_style_change_hands(found, expected):
    seed_all(3)
    features = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 7, dtype=torch.float64)
    results = []
    for function in (found, expected):
        seed_all(4)
        rows = function(features)
        results.append((rows, torch.autograd.grad((weights * rows).sum(), features)[0]))
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other)


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
    algorithm.step(optimizer)
    return optimizer, metrics


def by_hand(data, weight: float, lr: float) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Gradients and losses of content, style and adversary, each after plain steps down the ones before."""
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


def test_three_updates_each_of_its_own_part_at_the_weights_left_by_the_one_before():
    data = batches()
    data[1] = data[1]._replace(images=data[1].images[:3], labels=data[1].labels[:3])
    optimizer, metrics = stepped(ready(SagNet(adversary_weight=0.8)), data, lr=0.5)
    steps, losses = by_hand(data, weight=0.8, lr=0.5)
    assert len(optimizer.seen) == 3
    for found, expected in zip(optimizer.seen, steps, strict=True):
        assert_same(found, expected)
    assert_same(metrics, dict(zip(("loss", "style", "adversary"), losses, strict=True)))
    assert not any(value.requires_grad for value in metrics.values())


def test_the_adversary_makes_the_style_tell_less_of_the_class():
    """Down its gradient the style head comes nearer to chance; up it, it would know better."""
    data, algorithm = batches(), ready(SagNet(adversary_weight=1.0))
    with torch.no_grad():
        algorithm.style_head.weight *= 20
    optimizer, _ = stepped(algorithm, data, lr=0.0)
    named, images = dict(algorithm.named_parameters()), join(data).images

    def from_chance() -> Tensor:
        seed_all(6)
        with torch.no_grad():
            logits = algorithm.style_head(swap_contents(algorithm.model.featurize(images)))
        return -logits.log_softmax(1).mean()

    before = from_chance()
    with torch.no_grad():
        for name, grad in optimizer.seen[2].items():
            named[name] -= 1e-3 * grad
    assert from_chance() < before


def test_a_weight_of_0_leaves_the_adversary_out():
    data = batches()
    optimizer, metrics = stepped(ready(SagNet(adversary_weight=0.0)), data, lr=0.1)
    steps, _ = by_hand(data, weight=0.0, lr=0.1)
    assert len(optimizer.seen) == 2
    for found, expected in zip(optimizer.seen, steps[:2], strict=True):
        assert_same(found, expected)
    assert metrics.keys() == {"loss", "style", "adversary"}


def test_nothing_is_randomized_in_prediction():
    algorithm, images = ready(SagNet(adversary_weight=0.1)), batches()[0].images
    assert torch.equal(algorithm.predict(images), classifier()(images))


def test_the_style_head_is_in_the_state():
    data, first, second = batches(), ready(SagNet(adversary_weight=0.5)), ready(SagNet(adversary_weight=0.5))
    stepped(first, data, lr=0.3)
    second.load_state_dict(first.state_dict())
    found, expected = (stepped(one, data, lr=0.3)[0].seen for one in (second, first))
    for own, other in zip(found, expected, strict=True):
        assert_same(own, other, rtol=0, atol=0)


def test_bad_values_are_refused():
    with pytest.raises(UserError, match=r"^algorithm\.adversary_weight: found -0\.5, expected a number in"):
        SagNet(adversary_weight=-0.5)


class InfiniteSlope(torch.autograd.Function):
    """The identity, whose gradient is infinite: a finite loss does not show it."""

    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def spoil(algorithm: SagNet, call: int) -> None:
    """Of the style head's two uses in a step, the `call`-th has an infinite gradient."""
    calls = []

    def hook(module, inputs, logits):
        calls.append(None)
        return InfiniteSlope.apply(logits) if (len(calls) - 1) % 2 == call else logits

    algorithm.style_head.register_forward_hook(hook)


@pytest.mark.parametrize(("call", "source", "part"), [(0, "style", "style_head."), (1, "adversary", "model.")])
def test_a_later_gradient_that_is_not_finite_makes_no_step(call, source, part):
    data, algorithm = batches(), ready(SagNet(adversary_weight=0.8))
    spoil(algorithm, call)
    with pytest.raises(NonFiniteGradient, match=f"the gradient of the {source}'s loss holds NaN or inf"):
        stepped(algorithm, data, lr=0.1)
    assert all(p.isfinite().all() for p in algorithm.parameters())


@pytest.mark.parametrize(("call", "source", "left_out"), [(0, "style", 1), (1, "adversary", 2)])
def test_where_reading_waits_zeros_take_its_place_and_the_loss_is_blamed(call, source, left_out):
    data, algorithm = batches(), ready(SagNet(adversary_weight=0.8))
    algorithm.later_steps._reading_is_free = False  # a mock: the real one needs a GPU
    assert algorithm.blame() == ""
    spoil(algorithm, call)
    optimizer, _ = stepped(algorithm, data, lr=0.1)
    assert [all(not g.any() for g in seen.values()) for seen in optimizer.seen] == [k == left_out for k in range(3)]
    assert algorithm.blame().startswith(f"the gradient of the {source}'s loss holds NaN or inf: zeros went")


def test_a_gradient_that_is_not_finite_under_a_finite_loss_stops_the_run_before_it_is_saved(
    compose, tmp_path, monkeypatch
):
    setup = SagNet.setup
    monkeypatch.setattr(SagNet, "setup", lambda self, *args: (setup(self, *args), spoil(self, 0)))
    with pytest.raises(NonFiniteGradient, match="style's loss"):
        run(prepare(compose(*SMALL, "algorithm=sagnet", "trainer.steps=3", "trainer.checkpoint_every=1")))
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("on_accelerator", [False, True])
def test_a_later_loss_that_is_not_finite_stops_the_run_before_it_is_saved(
    compose, tmp_path, monkeypatch, on_accelerator
):
    setup = SagNet.setup

    def on_path(self, *args):
        setup(self, *args)
        self.later_steps._reading_is_free = not on_accelerator

    monkeypatch.setattr(SagNet, "setup", on_path)
    monkeypatch.setattr("gsdg.algorithms.sagnet.swap_contents", lambda features: features * torch.nan)
    with pytest.raises(NonFinite if on_accelerator else NonFiniteGradient, match="style"):
        run(prepare(compose(*SMALL, "algorithm=sagnet", "trainer.steps=3", "trainer.checkpoint_every=1")))
    assert not list(tmp_path.rglob("*.pt"))
