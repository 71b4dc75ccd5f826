"""Fish against a copy of the network that makes the steps of the domains."""

from __future__ import annotations

import copy

import pytest
import torch
from algorithm_cases import assert_same, batches, classifier, ready, risk, seed_all
from torch import nn

from gsdg.algorithms import Fish
from gsdg.surgery import NonFiniteGradient
from gsdg.types import Batch

OPTIMIZERS = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.01, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}


def update(algorithm: Fish, optimizer: torch.optim.Optimizer, data) -> dict:
    optimizer.zero_grad(set_to_none=True)
    metrics = algorithm.backward(data)
    return metrics | algorithm.step(optimizer)


def statistics() -> nn.Module:
    """Two kinds of BatchNorm. A bias right before a BatchNorm has gradient 0, and Adam amplifies its rounding error."""
    torch.manual_seed(0)
    layers = [nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 5)]
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6, bias=False), *layers).double()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("make", [classifier, statistics])
def test_the_weights_go_part_of_the_way_of_the_domains_steps(kind, make):
    """Three updates; the copy's optimizer keeps its state from one to the next, as ours does."""
    for meta_lr in (0.3, 1.0):
        model, algorithm = make(), Fish(meta_lr=meta_lr)
        algorithm.setup(make(), ["a", "b", "c"])
        optimizer, state = OPTIMIZERS[kind](algorithm.parameter_groups()), None
        for t in range(3):
            data = [*batches(2, seed=t), *batches(1, images=7, seed=10 + t)]
            metrics = update(algorithm, optimizer, data)
            inner, losses = copy.deepcopy(model), []
            inner_optimizer = OPTIMIZERS[kind](inner.parameters())
            if state is not None:
                inner_optimizer.load_state_dict(state)
            for batch in data:
                inner_optimizer.zero_grad()
                loss = risk(inner, batch)
                loss.backward()
                inner_optimizer.step()
                losses.append(loss.item())
            state, after = inner_optimizer.state_dict(), inner.state_dict()
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    value += meta_lr * (after[name] - value)
                else:
                    value.copy_(after[name])  # a count
            assert metrics["loss"].item() == pytest.approx(sum(losses) / 3)
            assert_same(algorithm.model.state_dict(), model.state_dict(), rtol=1e-9, atol=1e-12)


def test_shuffle_draws_the_order():
    data, weights = batches(), []
    seed_all(2)
    drawn = torch.randperm(3).tolist()
    assert drawn != [0, 1, 2]
    for shuffle, order in ((True, [0, 1, 2]), (False, [0, 1, 2]), (False, drawn)):
        algorithm = ready(Fish(meta_lr=1.0, shuffle=shuffle))
        seed_all(2)
        update(algorithm, torch.optim.SGD(algorithm.parameter_groups(), lr=0.1), [data[d] for d in order])
        weights.append(algorithm.model.head.weight.detach().clone())
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])


def poisoned(data: list[Batch], d: int) -> list[Batch]:
    return [batch._replace(images=batch.images * float("nan")) if k == d else batch for k, batch in enumerate(data)]


def test_a_later_domain_that_is_not_finite_leaves_the_weights_alone():
    message = "the gradient of domain 'domain 1', after .* no optimizer step was made with it"
    for make in (classifier, statistics):
        algorithm, data = Fish(meta_lr=0.5), batches()
        algorithm.setup(make(), [batch.domain for batch in data])
        optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=0.01)
        with pytest.raises(NonFiniteGradient, match=message):
            update(algorithm, optimizer, poisoned(data, 1))
        assert_same(dict(algorithm.model.named_parameters()), dict(make().named_parameters()), rtol=0, atol=0)
        assert all(buffer.isfinite().all() for buffer in algorithm.model.buffers())


def test_where_reading_waits_zeros_take_its_place_and_the_first_such_domain_is_named():
    algorithm, data = ready(Fish(meta_lr=0.5)), batches()
    algorithm.later_steps._sync_is_free = False
    optimizer = torch.optim.SGD(algorithm.parameter_groups(), lr=0.1)
    update(algorithm, optimizer, data)
    assert algorithm.nonfinite_report() == ""
    without = copy.deepcopy(algorithm)
    update(algorithm, optimizer, poisoned(data, 1))
    update(without, torch.optim.SGD(without.parameter_groups(), lr=0.1), [data[0], data[2]])
    assert_same(dict(algorithm.model.named_parameters()), dict(without.model.named_parameters()))
    update(algorithm, optimizer, poisoned(data, 2))
    assert algorithm.nonfinite_report().startswith("the gradient of domain 'domain 1'")
    assert all(p.isfinite().all() for p in algorithm.model.parameters())
