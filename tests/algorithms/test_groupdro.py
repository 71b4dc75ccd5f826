"""GroupDRO against its recurrence."""

from __future__ import annotations

import math

import pytest
import torch
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, ready, risk

from gsdg.algorithms import GroupDRO
from gsdg.errors import UserError


def raised(q: list[float], risks: list[float], eta: float) -> list[float]:
    """One step of the recurrence, in plain numbers."""
    grown = [own * math.exp(eta * value) for own, value in zip(q, risks, strict=True)]
    return [own / sum(grown) for own in grown]


def test_the_weights_follow_the_recurrence_and_are_constants_in_the_gradient():
    algorithm, q = ready(GroupDRO(eta=2.0)), [1 / 3] * 3
    for seed in range(3):
        data, model = batches(seed=seed), algorithm.model
        risks = [risk(model, batch) for batch in data]
        q = raised(q, [value.item() for value in risks], 2.0)
        loss = sum(weight * value for weight, value in zip(q, risks, strict=True))
        expected = gradients_of(model, loss)
        assert_same(gradients(algorithm, data), expected)
        torch.testing.assert_close(algorithm.log_q.exp(), torch.tensor(q, dtype=torch.float64))
    assert max(q) > 0.4


def test_the_loss_is_the_weighted_risk():
    data, model = batches(), classifier()
    risks = [risk(model, batch).item() for batch in data]
    q = raised([1 / 3] * 3, risks, 1.0)
    metrics = ready(GroupDRO(eta=1.0)).backward(data)
    assert metrics["loss"].item() == pytest.approx(sum(own * value for own, value in zip(q, risks, strict=True)))
    assert metrics["worst"].item() == pytest.approx(max(risks))
    assert metrics["largest_weight"].item() == pytest.approx(max(q))


def test_with_eta_0_it_is_erm():
    data, model = batches(), classifier()
    erm = gradients_of(model, sum(risk(model, batch) for batch in data) / len(data))
    assert_same(gradients(ready(GroupDRO(eta=0.0)), data), erm, rtol=1e-12, atol=1e-14)


def test_a_weight_recovers_from_below_the_smallest_float():
    """e^-200 is 0 in float32; every step adds 30 to the exponent of the domain with the higher risk."""
    data, model = batches(2, dtype=torch.float32), classifier(torch.float32)
    risks = [risk(model, batch).item() for batch in data]
    algorithm = ready(GroupDRO(eta=30 / abs(risks[0] - risks[1])), domains=2, dtype=torch.float32)
    worst = risks.index(max(risks))
    algorithm.log_q[worst], algorithm.log_q[1 - worst] = -200.0, 0.0
    found = []
    for _ in range(9):
        algorithm.backward(data)
        found.append(algorithm.log_q.exp()[worst].item())
    assert found[:3] == [0, 0, 0]
    assert found[-1] > 0.99


def test_the_weights_survive_a_resume_exactly():
    first, second = ready(GroupDRO(eta=0.7)), ready(GroupDRO(eta=0.7))
    for seed in range(3):
        first.backward(batches(seed=seed))
    second.load_state_dict(first.state_dict())
    data = batches(seed=5)
    assert_same(gradients(second, data), gradients(first, data), rtol=0, atol=0)


@pytest.mark.parametrize("eta", [-0.1, math.inf, math.nan])
def test_a_bad_step_size_is_refused(eta):
    with pytest.raises(UserError, match=r"algorithm\.eta: found .*, expected a number in"):
        GroupDRO(eta=eta)
