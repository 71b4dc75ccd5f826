"""Fish against a copy of the network that makes the domains' steps."""

from __future__ import annotations

import copy

import pytest
import torch
from algorithm_cases import batches, classifier, ready, risk, seed_all
from torch import nn

from gsdg.algorithms import Fish
from gsdg.batch import Batch
from gsdg.errors import UserError
from gsdg.surgery import NonFiniteGradient

OPTIMIZERS = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.01, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}


def update(algorithm: Fish, optimizer: torch.optim.Optimizer, data) -> dict:
    optimizer.zero_grad(set_to_none=True)
    metrics = algorithm.backward(data)
    algorithm.step(optimizer)
    return metrics


def statistics() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.BatchNorm1d(6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 5)]
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6), *layers).double()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("make", [classifier, statistics])
@pytest.mark.parametrize("meta_lr", [0.3, 1.0])
def test_the_weights_go_part_of_the_way_of_the_domains_steps(kind, make, meta_lr):
    """Three updates; the copy's optimizer keeps its state from one to the next, as ours does."""
    model, algorithm = make(), Fish(meta_lr=meta_lr)
    algorithm.setup(make(), ["a", "b", "c"])
    optimizer, state = OPTIMIZERS[kind](algorithm.parameter_groups()), None
    for t in range(3):
        data = [*batches(2, seed=t), *batches(1, images=7, seed=10 + t)]
        metrics = update(algorithm, optimizer, data)
        inner = copy.deepcopy(model)
        inner_optimizer, losses = OPTIMIZERS[kind](inner.parameters()), []
        if state is not None:
            inner_optimizer.load_state_dict(state)
        for batch in data:
            inner_optimizer.zero_grad()
            loss = risk(inner, batch)
            loss.backward()
            inner_optimizer.step()
            losses.append(loss.item())
        state = inner_optimizer.state_dict()
        after = inner.state_dict()
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value += meta_lr * (after[name] - value)
            else:
                value.copy_(after[name])  # a count
        assert metrics["loss"].item() == pytest.approx(sum(losses) / 3)
        for name, value in algorithm.model.state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-9, atol=1e-12)


def test_backward_is_the_first_domains_gradient_alone():
    data, model, algorithm = batches(), classifier(), ready(Fish(meta_lr=0.5))
    algorithm.backward(data)
    for p, q in zip(algorithm.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    risk(model, data[0]).backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(algorithm.model.parameters(), model.parameters(), strict=True)
    )


def test_shuffle_draws_the_order():
    data, found = batches(), []
    for shuffle, order in ((True, None), (False, None), (False, "drawn")):
        algorithm = ready(Fish(meta_lr=1.0, shuffle=shuffle))
        seed_all(2)
        drawn = torch.randperm(3).tolist() if order else range(3)
        seed_all(2)
        update(algorithm, torch.optim.SGD(algorithm.parameter_groups(), lr=0.1), [data[d] for d in drawn])
        found.append(algorithm.model.head.weight.detach().clone())
    assert list(drawn) != [0, 1, 2]
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def poisoned(data: list[Batch], d: int) -> list[Batch]:
    return [batch._replace(images=batch.images * float("nan")) if k == d else batch for k, batch in enumerate(data)]


@pytest.mark.parametrize("make", [classifier, statistics])
def test_a_later_domain_that_is_not_finite_leaves_the_weights_alone(make):
    algorithm, data = Fish(meta_lr=0.5), batches()
    algorithm.setup(make(), [batch.domain for batch in data])
    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=0.01)
    with pytest.raises(NonFiniteGradient, match="the gradient of domain 'domain 1', after .* made no step with it"):
        update(algorithm, optimizer, poisoned(data, 1))
    for (name, p), q in zip(algorithm.model.named_parameters(), make().parameters(), strict=True):
        assert torch.equal(p, q), name
    assert all(buffer.isfinite().all() for buffer in algorithm.model.buffers())


def test_where_reading_waits_zeros_take_its_place_and_the_first_domain_is_blamed():
    algorithm, data = ready(Fish(meta_lr=0.5)), batches()
    algorithm.later_steps._reading_is_free = False
    optimizer = torch.optim.SGD(algorithm.parameter_groups(), lr=0.1)
    update(algorithm, optimizer, data)
    assert algorithm.blame() == ""
    without = copy.deepcopy(algorithm)
    update(algorithm, optimizer, poisoned(data, 1))
    update(without, torch.optim.SGD(without.parameter_groups(), lr=0.1), [data[0], data[2]])
    for p, q in zip(algorithm.model.parameters(), without.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    update(algorithm, optimizer, poisoned(data, 2))
    assert algorithm.blame().startswith("the gradient of domain 'domain 1'")
    assert all(p.isfinite().all() for p in algorithm.model.parameters())


def test_a_meta_lr_of_0_is_refused():
    with pytest.raises(UserError, match=r"algorithm.meta_lr: found 0.0, expected a number in"):
        Fish(meta_lr=0.0)
