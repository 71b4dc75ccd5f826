"""GroupDRO against its recurrence."""

from __future__ import annotations

import math

import pytest
import torch
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, ready, risk

from gsdg.algorithms import GroupDRO


def raised(q: list[float], risks: list[float], eta: float) -> list[float]:
    """One step of the recurrence, in plain numbers."""
    grown = [share * math.exp(eta * value) for share, value in zip(q, risks, strict=True)]
    return [share / sum(grown) for share in grown]


def test_the_weights_follow_the_recurrence_and_are_constants_in_the_gradient():
    algorithm, q = ready(GroupDRO(eta=2.0)), [1 / 3] * 3
    for seed in range(3):
        data, model = batches(seed=seed), algorithm.model
        risks = [risk(model, batch) for batch in data]
        q = raised(q, [value.item() for value in risks], 2.0)
        loss = sum(weight * value for weight, value in zip(q, risks, strict=True))
        expected, before = gradients_of(model, loss), algorithm.log_q.clone()
        assert_same(gradients(algorithm, data), expected)
        torch.testing.assert_close(algorithm.log_q.exp(), torch.tensor(q, dtype=torch.float64))
        algorithm.log_q.copy_(before)
        metrics = algorithm.backward(data)
        assert metrics["loss"].item() == pytest.approx(loss.item())
        assert metrics["worst"].item() == pytest.approx(max(risks).item())
        assert metrics["largest_weight"].item() == pytest.approx(max(q))
    assert max(q) > 0.4


def test_a_weight_recovers_from_below_the_smallest_float():
    """e^-200 is 0 in float32; every step adds 30 to the exponent of the domain with the higher risk."""
    data, model = batches(2, dtype=torch.float32), classifier(torch.float32)
    risks = [risk(model, batch).item() for batch in data]
    algorithm = ready(GroupDRO(eta=30 / abs(risks[0] - risks[1])), domains=2, dtype=torch.float32)
    worst = risks.index(max(risks))
    algorithm.log_q[worst], algorithm.log_q[1 - worst] = -200.0, 0.0
    shares = []
    for _ in range(9):
        algorithm.backward(data)
        shares.append(algorithm.log_q.exp()[worst].item())
    assert shares[:3] == [0, 0, 0]
    assert shares[-1] > 0.99
