"""EQRM against its equation: the quantile by root finding in plain numbers, its gradient by differences."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, ready, risk

from gsdg.algorithms import EQRM
from gsdg.errors import UserError

RISKS = [[1.0, 2.5], [0.3, 0.5, 2.0], [3.0, 1.0, 1.2, 0.9, 1.1], [5.0, 5.0, 5.0, 5.1]]


def made(*, quantile: float = 0.75, anneal_steps: int = 0, final_lr: float = 1e-3, **options) -> EQRM:
    return EQRM(quantile=quantile, anneal_steps=anneal_steps, final_lr=final_lr, **options)


def bandwidth(risks: list[float]) -> float:
    mean = sum(risks) / len(risks)
    return 1.06 * math.sqrt(sum((r - mean) ** 2 for r in risks) / (len(risks) - 1)) * len(risks) ** -0.2


def quantile_of(risks: list[float], alpha: float) -> float:
    """Where the mean of the kernels' CDFs is alpha, by 200 bisections."""
    h = bandwidth(risks)
    low, high = min(risks) - 10 * h, max(risks) + 10 * h
    for _ in range(200):
        x = (low + high) / 2
        below = sum(NormalDist(r, h).cdf(x) for r in risks) / len(risks) < alpha
        low, high = (x, high) if below else (low, x)
    return (low + high) / 2


def weights_of(risks: list[float], alpha: float, **options) -> torch.Tensor:
    return made(quantile=alpha, **options).weights(torch.tensor(risks, dtype=torch.float64))


@pytest.mark.parametrize("gradient", ["exact", "bracket"])
@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("risks", RISKS, ids=str)
def test_the_weighted_risks_are_the_quantile(risks, alpha, gradient):
    weights = weights_of(risks, alpha, gradient=gradient)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    found = sum(w * r for w, r in zip(weights.tolist(), risks, strict=True))
    assert found == pytest.approx(quantile_of(risks, alpha), abs=1e-8)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("risks", RISKS, ids=str)
def test_the_weights_are_the_derivatives_of_the_quantile(risks, alpha):
    step, expected = 1e-5, []
    for d in range(len(risks)):
        moved = [[r + sign * step * (e == d) for e, r in enumerate(risks)] for sign in (1, -1)]
        expected.append((quantile_of(moved[0], alpha) - quantile_of(moved[1], alpha)) / (2 * step))
    torch.testing.assert_close(weights_of(risks, alpha), torch.tensor(expected).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("risks", RISKS[:3], ids=str)
def test_bracket_is_the_gradient_of_a_fixed_point_between_the_ends(risks):
    """With autograd through the ends, as DomainBed has it; of two domains it is the exact one."""
    own = torch.tensor(risks, dtype=torch.float64, requires_grad=True)
    h = 1.06 * own.std() * len(risks) ** -0.2
    low, high = own.min() + h * NormalDist().inv_cdf(0.8), own.max() + h * NormalDist().inv_cdf(0.8)
    share = ((quantile_of(risks, 0.8) - low) / (high - low)).detach()
    (expected,) = torch.autograd.grad((1 - share) * low + share * high, own)
    torch.testing.assert_close(weights_of(risks, 0.8, gradient="bracket"), expected, rtol=0, atol=1e-8)
    apart = (weights_of(risks, 0.8) - expected).abs().max()
    assert apart < 1e-8 if len(risks) == 2 else apart > 0.01


@pytest.mark.parametrize("risks", [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]], ids=str)
@pytest.mark.parametrize("gradient", ["exact", "bracket"])
def test_equal_risks_count_equally(risks, gradient):
    assert weights_of(risks, 0.9, gradient=gradient).tolist() == [1 / 3] * 3


def test_float32_is_accurate_and_nearly_equal_risks_are_no_problem():
    found = made().weights(torch.tensor([0.3, 0.5, 2.0]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), weights_of([0.3, 0.5, 2.0], 0.75), rtol=0, atol=1e-5)
    near = made().weights(torch.tensor([2.3, 2.3 + 3e-7, 2.3 - 3e-7]))
    torch.testing.assert_close(near.sum(), torch.tensor(1.0))
    assert near.abs().max() < 2


@pytest.mark.parametrize("images", [4, 6])
def test_the_gradient_in_the_networks_parameters(images):
    data, model = [*batches(2), *batches(1, images=images, seed=3)], classifier()
    algorithm, risks = ready(made(quantile=0.9)), [risk(model, batch) for batch in data]
    plain = [value.item() for value in risks]
    weights = weights_of(plain, 0.9)
    expected = gradients_of(model, sum(w * r for w, r in zip(weights, risks, strict=True)))
    assert_same(gradients(algorithm, data), expected)
    assert algorithm.backward(data)["loss"].item() == pytest.approx(quantile_of(plain, 0.9), abs=1e-8)


def test_before_the_burn_in_ends_it_is_erm():
    data, model = batches(), classifier()
    erm = gradients_of(model, sum(risk(model, batch) for batch in data) / len(data))
    assert_same(gradients(ready(made(anneal_steps=1)), data), erm, rtol=1e-12, atol=1e-14)


def test_at_its_end_the_optimizer_forgets_and_takes_the_final_lr():
    data, algorithm = batches(), ready(made(anneal_steps=2, final_lr=1e-5))
    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=1e-3)
    ages, moved = [], []
    for _ in range(4):
        before = algorithm.model.head.bias.detach().clone()
        gradients(algorithm, data)
        algorithm.step(optimizer)
        ages.append(int(optimizer.state[algorithm.model.head.weight]["step"]))
        moved.append((algorithm.model.head.bias - before).abs().max().item())
    assert ages == [1, 2, 1, 2]
    assert moved == pytest.approx([1e-3, 1e-3, 1e-5, 1e-5], rel=0.05)


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_resume_before_at_and_after_the_end_changes_nothing(done):
    def start():
        algorithm = ready(made(anneal_steps=2, final_lr=1e-2))
        return algorithm, torch.optim.Adam(algorithm.parameter_groups(), lr=1e-3)

    def train(algorithm, optimizer, steps):
        for step in steps:
            gradients(algorithm, batches(seed=step))
            algorithm.step(optimizer)

    whole, optimizer = start()
    train(whole, optimizer, range(5))
    first, optimizer = start()
    train(first, optimizer, range(done))
    second, resumed = start()
    second.load_state_dict(first.state_dict()), resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, range(done, 5))
    for found, expected in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantile": 1.0}, r"algorithm\.quantile: found 1\.0, expected a number in \(0, 1\)"),
        ({"quantile": 0.0}, r"algorithm\.quantile: found 0\.0"),
        ({"final_lr": -1.0}, r"algorithm\.final_lr: found -1\.0, expected a number in"),
        ({"anneal_steps": -1}, r"algorithm\.anneal_steps: found -1"),
        ({"gradient": "none"}, r"algorithm\.gradient is 'none'; valid: exact, bracket"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        made(**values)
