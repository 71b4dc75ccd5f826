"""V-REx against its equation."""

from __future__ import annotations

import pytest
import torch
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, ready, risk
from torch import Tensor

from gsdg.algorithms import VREx
from gsdg.errors import UserError


def objective(model, data, weight: float) -> Tensor:
    """The mean risk and the variance as half the mean squared difference of all pairs; nothing is held constant."""
    risks = [risk(model, batch) for batch in data]
    pairs = [(first - second) ** 2 / 2 for first in risks for second in risks]
    return sum(risks) / len(risks) + weight * sum(pairs) / len(pairs)


def test_the_penalty_is_the_variance_of_the_risks():
    data, model = batches(), classifier()
    algorithm = ready(VREx(penalty_weight=30.0, anneal_steps=0))
    assert_same(gradients(algorithm, data), gradients_of(model, objective(model, data, 30.0)))
    assert algorithm.backward(data)["loss"].item() == pytest.approx(objective(model, data, 30.0).item(), rel=1e-12)


def test_without_penalty_it_is_erm():
    data, model = batches(), classifier()
    erm = sum(risk(model, batch) for batch in data) / len(data)
    found = gradients(ready(VREx(penalty_weight=0.0, anneal_steps=0)), data)
    assert_same(found, gradients_of(model, erm), rtol=1e-12, atol=1e-14)


def test_domains_count_equally_whatever_their_images():
    data, model = [*batches(2), *batches(1, images=7, seed=2)], classifier()
    found = gradients(ready(VREx(penalty_weight=3.0, anneal_steps=0)), data)
    assert_same(found, gradients_of(model, objective(model, data, 3.0)))


def test_before_the_annealing_ends_the_weight_is_1_and_at_its_end_the_optimizer_forgets():
    data, algorithm = batches(), ready(VREx(penalty_weight=30.0, anneal_steps=2))
    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=0.0)
    ages = []
    for step in range(4):
        model = algorithm.model
        assert_same(gradients(algorithm, data), gradients_of(model, objective(model, data, 1.0 if step < 2 else 30.0)))
        algorithm.step(optimizer)
        ages.append(int(optimizer.state[model.head.weight]["step"]))
    assert ages == [1, 2, 1, 2]


def test_the_steps_done_survive_a_resume():
    data, first = batches(), ready(VREx(penalty_weight=30.0, anneal_steps=1))
    first.step(torch.optim.Adam(first.parameter_groups(), lr=0.0))
    second = ready(VREx(penalty_weight=30.0, anneal_steps=1))
    second.load_state_dict(first.state_dict())
    assert_same(gradients(second, data), gradients_of(second.model, objective(second.model, data, 30.0)))


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_a_bad_weight_is_refused(weight):
    with pytest.raises(UserError, match=r"algorithm\.penalty_weight: found (-1\.0|nan), expected a number in"):
        VREx(penalty_weight=weight, anneal_steps=0)
