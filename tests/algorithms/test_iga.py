"""IGA against its equation, by double autograd."""

from __future__ import annotations

import pytest
import torch
from algorithm_cases import (
    assert_losses_average_to,
    assert_same,
    batches,
    classifier,
    gradients,
    gradients_of,
    ready,
    risk,
)
from torch import Tensor

from gsdg.algorithms import IGA


def penalty(model, data) -> Tensor:
    """sum_d |g_d - g|^2, parameter by parameter; the graph goes through the mean gradient too."""
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(risk(model, batch), parameters, create_graph=True) for batch in data]
    total = 0
    for k in range(len(parameters)):
        mean = sum(grad[k] for grad in grads) / len(data)
        for grad in grads:
            total = total + ((grad[k] - mean) ** 2).sum()
    return total


def objective(model, data, weight: float) -> Tensor:
    return sum(risk(model, batch) for batch in data) / len(data) + weight * penalty(model, data)


@pytest.mark.parametrize("domains", [2, 3])
def test_the_gradient_is_that_of_the_whole_objective(domains):
    """Also if surgery takes the mean of the domains' losses."""
    data, model, algorithm = batches(domains), classifier(), ready(IGA(penalty_weight=50.0), domains=domains)
    expected = objective(model, data, 50.0)
    assert_same(gradients(algorithm, data), gradients_of(model, expected), rtol=1e-9, atol=1e-12)
    assert_losses_average_to(expected, algorithm, data, model)
    metrics = algorithm.backward(data)
    assert metrics["penalty"].item() == pytest.approx(penalty(model, data).item(), rel=1e-10)
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-10)


def test_frozen_parameters_and_those_that_no_risk_depends_on_are_no_part_of_the_penalty():
    data, algorithm, model = batches(), ready(IGA(penalty_weight=50.0)), classifier()
    algorithm.model.idle = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    for part in (algorithm.model, model):
        part.featurizer.requires_grad_(False)
    head = [[*torch.autograd.grad(risk(model, b), model.head.parameters(), create_graph=True)] for b in data]
    flat = torch.stack([torch.cat([grad.flatten() for grad in grads]) for grads in head])
    loss = sum(risk(model, b) for b in data) / 3 + 50.0 * (flat.var(0, correction=0) * 3).sum()
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(gradients(algorithm, data), expected)
