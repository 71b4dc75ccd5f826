"""V-REx against its equation."""

from __future__ import annotations

import pytest
from algorithm_cases import assert_annealed, assert_same, batches, classifier, gradients, gradients_of, ready, risk
from torch import Tensor

from gsdg.algorithms import VREx


def objective(model, data, weight: float) -> Tensor:
    """The mean risk and the variance as half the mean squared difference of all pairs; nothing is held constant."""
    risks = [risk(model, batch) for batch in data]
    pairs = [(first - second) ** 2 / 2 for first in risks for second in risks]
    return sum(risks) / len(risks) + weight * sum(pairs) / len(pairs)


def test_the_penalty_is_the_variance_of_the_risks_and_domains_count_equally():
    for data in (batches(), [*batches(2), *batches(1, images=7, seed=2)]):
        model, algorithm = classifier(), ready(VREx(penalty_weight=30.0, anneal_steps=0))
        expected = objective(model, data, 30.0)
        assert_same(gradients(algorithm, data), gradients_of(model, expected))
        assert algorithm.backward(data)["loss"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_before_the_annealing_ends_the_weight_is_1_and_at_its_end_the_optimizer_is_reset():
    data = batches()
    algorithm = ready(VREx(penalty_weight=30.0, anneal_steps=2))
    assert_annealed(algorithm, data, lambda model, step: objective(model, data, 1.0 if step < 2 else 30.0))
