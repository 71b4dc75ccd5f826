"""EQRM against its equation: the quantile by root finding on Python numbers, its gradient by finite differences."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, ready, risk

from gsdg.algorithms import EQRM

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


@pytest.mark.parametrize("risks", RISKS, ids=str)
def test_the_weights_are_the_derivatives_of_the_quantile_and_the_weighted_risks_are_the_quantile(risks):
    step = 1e-5
    for alpha in (0.05, 0.5, 0.75, 0.99):
        for gradient in ("exact", "bracket"):
            weights = weights_of(risks, alpha, gradient=gradient)
            assert weights.sum().item() == pytest.approx(1, abs=1e-12), (alpha, gradient)
            weighted = sum(w * r for w, r in zip(weights.tolist(), risks, strict=True))
            assert weighted == pytest.approx(quantile_of(risks, alpha), abs=1e-8), (alpha, gradient)
        expected = []
        for d in range(len(risks)):
            moved = [[r + sign * step * (e == d) for e, r in enumerate(risks)] for sign in (1, -1)]
            expected.append((quantile_of(moved[0], alpha) - quantile_of(moved[1], alpha)) / (2 * step))
        torch.testing.assert_close(weights_of(risks, alpha), torch.tensor(expected).double(), rtol=0, atol=1e-5)


def test_bracket_is_the_gradient_of_a_fixed_point_between_the_ends():
    """With autograd through the ends, as DomainBed has it; with two domains it is the exact one."""
    for risks in RISKS[:3]:
        leaf = torch.tensor(risks, dtype=torch.float64, requires_grad=True)
        h = 1.06 * leaf.std() * len(risks) ** -0.2
        low, high = leaf.min() + h * NormalDist().inv_cdf(0.8), leaf.max() + h * NormalDist().inv_cdf(0.8)
        share = ((quantile_of(risks, 0.8) - low) / (high - low)).detach()
        (expected,) = torch.autograd.grad((1 - share) * low + share * high, leaf)
        torch.testing.assert_close(weights_of(risks, 0.8, gradient="bracket"), expected, rtol=0, atol=1e-8)
        apart = (weights_of(risks, 0.8) - expected).abs().max()
        assert apart < 1e-8 if len(risks) == 2 else apart > 0.01, risks


def test_equal_risks_count_equally():
    for risks in ([0.0, 0.0, 0.0], [2.0, 2.0, 2.0]):
        for gradient in ("exact", "bracket"):
            assert weights_of(risks, 0.9, gradient=gradient).tolist() == [1 / 3] * 3


def test_float32_is_accurate_also_for_nearly_equal_risks():
    weights = made().weights(torch.tensor([0.3, 0.5, 2.0]))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), weights_of([0.3, 0.5, 2.0], 0.75), rtol=0, atol=1e-5)
    near = made().weights(torch.tensor([2.3, 2.3 + 3e-7, 2.3 - 3e-7]))
    torch.testing.assert_close(near.sum(), torch.tensor(1.0))
    assert near.abs().max() < 2


def test_the_gradient_in_the_networks_parameters():
    for images in (4, 6):
        data, model = [*batches(2), *batches(1, images=images, seed=3)], classifier()
        algorithm, risks = ready(made(quantile=0.9)), [risk(model, batch) for batch in data]
        plain = [value.item() for value in risks]
        expected = gradients_of(model, sum(w * r for w, r in zip(weights_of(plain, 0.9), risks, strict=True)))
        assert_same(gradients(algorithm, data), expected)
        assert algorithm.backward(data)["loss"].item() == pytest.approx(quantile_of(plain, 0.9), abs=1e-8)


def test_at_the_end_of_the_burn_in_the_optimizer_is_reset_and_takes_the_final_lr():
    data, algorithm = batches(), ready(made(anneal_steps=2, final_lr=1e-5))
    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=1e-3)
    steps_of_adam, moved = [], []
    for _ in range(4):
        before = algorithm.model.head.bias.detach().clone()
        gradients(algorithm, data)
        algorithm.step(optimizer)
        steps_of_adam.append(int(optimizer.state[algorithm.model.head.weight]["step"]))
        moved.append((algorithm.model.head.bias - before).abs().max().item())
    assert steps_of_adam == [1, 2, 1, 2]
    assert moved == pytest.approx([1e-3, 1e-3, 1e-5, 1e-5], rel=0.05)


def test_a_resume_before_at_and_after_the_end_of_the_burn_in_changes_nothing():
    def start():
        algorithm = ready(made(anneal_steps=2, final_lr=1e-2))
        return algorithm, torch.optim.Adam(algorithm.parameter_groups(), lr=1e-3)

    whole, optimizer = start()
    parts, optimizer_of_parts = start()
    for step in range(5):
        if step in (1, 2, 3):
            states = parts.state_dict(), optimizer_of_parts.state_dict()
            parts, optimizer_of_parts = start()
            parts.load_state_dict(states[0]), optimizer_of_parts.load_state_dict(states[1])
        for algorithm, steps in ((whole, optimizer), (parts, optimizer_of_parts)):
            gradients(algorithm, batches(seed=step))
            algorithm.step(steps)
        assert all(map(torch.equal, parts.parameters(), whole.parameters())), step
