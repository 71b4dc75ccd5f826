"""IGA against its equation, by double autograd, and against a directional difference of its gradient penalty."""

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
from gsdg.errors import UserError


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
    data, model = batches(domains), classifier()
    found = gradients(ready(IGA(penalty_weight=50.0), domains=domains), data)
    assert_same(found, gradients_of(model, objective(model, data, 50.0)), rtol=1e-9, atol=1e-12)


def test_the_mean_of_the_domains_losses_has_the_objectives_value_and_gradient():
    """So that they may go through gradient surgery; one domain's loss alone has another gradient."""
    data, algorithm, model = batches(), ready(IGA(penalty_weight=50.0)), classifier()
    assert_losses_average_to(objective(model, data, 50.0), algorithm, data, model)


def test_the_gradient_is_the_slope_of_the_objective():
    """No second derivative here: the objective at two points along the gradient, before the next kink of a ReLU."""
    data, algorithm = batches(), ready(IGA(penalty_weight=50.0))
    found, step = gradients(algorithm, data), 1e-9
    values = []
    for sign in (1, -1):
        model = classifier()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += sign * step * found[name]
        values.append(objective(model, data, 50.0).item())
    square = sum(grad.square().sum().item() for grad in found.values())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(square, rel=1e-5)


def test_what_is_recorded():
    data, model = batches(), classifier()
    metrics = ready(IGA(penalty_weight=50.0)).backward(data)
    assert metrics["penalty"].item() == pytest.approx(penalty(model, data).item(), rel=1e-10)
    assert metrics["loss"].item() == pytest.approx(objective(model, data, 50.0).item(), rel=1e-10)


def test_without_penalty_it_is_erm():
    data, model = batches(), classifier()
    erm = gradients_of(model, objective(model, data, 0.0))
    assert_same(gradients(ready(IGA(penalty_weight=0.0)), data), erm, rtol=1e-12, atol=1e-14)


def test_equal_domains_pay_nothing():
    data, model = [batches(1)[0]] * 2, classifier()
    metrics = ready(IGA(penalty_weight=50.0), domains=2).backward(data)
    assert metrics["penalty"].item() == pytest.approx(0, abs=1e-25)
    assert metrics["loss"].item() == pytest.approx(risk(model, data[0]).item())


def test_a_parameter_that_no_risk_depends_on_is_left_alone():
    algorithm = ready(IGA(penalty_weight=50.0))
    algorithm.model.idle = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    assert "idle" not in gradients(algorithm, batches())


def test_frozen_parameters_are_no_part_of_the_penalty():
    data, algorithm, model = batches(), ready(IGA(penalty_weight=50.0)), classifier()
    for part in (algorithm.model, model):
        part.featurizer.requires_grad_(False)
    found = gradients(algorithm, data)
    head = [[*torch.autograd.grad(risk(model, b), model.head.parameters(), create_graph=True)] for b in data]
    flat = torch.stack([torch.cat([grad.flatten() for grad in own]) for own in head])
    loss = sum(risk(model, b) for b in data) / 3 + 50.0 * (flat.var(0, correction=0) * 3).sum()
    loss.backward()
    assert_same(found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def test_a_negative_weight_is_refused():
    with pytest.raises(UserError, match=r"algorithm\.penalty_weight: found -1\.0, expected a number in"):
        IGA(penalty_weight=-1.0)
