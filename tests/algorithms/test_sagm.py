"""SAGM against its equation."""

from __future__ import annotations

import pytest
import torch
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, ready
from test_sam import joint_risk, moved

from gsdg.algorithms import ERM, SAGM, SAM
from gsdg.errors import UserError


def test_the_gradient_is_the_mean_of_both_weights():
    data, model = [*batches(2), *batches(1, images=7)], classifier()
    other = moved(model, data, lambda norm: 0.3 / norm - 0.2)
    here, there = gradients_of(model, joint_risk(model, data)), gradients_of(other, joint_risk(other, data))
    algorithm = ready(SAGM(rho=0.3, alpha=0.2))
    expected = {name: (here[name] + there[name]) / 2 for name in here}
    assert_same(gradients(algorithm, data), expected, rtol=1e-9, atol=1e-12)
    algorithm.zero_grad()
    metrics = algorithm.backward(data)
    torch.testing.assert_close(metrics["nll"], joint_risk(model, data).detach())
    torch.testing.assert_close(metrics["perturbed"], joint_risk(other, data).detach())
    torch.testing.assert_close(metrics["loss"], (metrics["nll"] + metrics["perturbed"]) / 2)


def test_alpha_0_is_the_mean_of_erm_and_sam():
    erm, sam = (gradients(ready(algorithm), batches()) for algorithm in (ERM(), SAM(rho=0.3)))
    expected = {name: (erm[name] + sam[name]) / 2 for name in erm}
    assert_same(gradients(ready(SAGM(rho=0.3, alpha=0.0)), batches()), expected, rtol=1e-12, atol=1e-15)


def test_rho_and_alpha_0_are_erm():
    found, expected = (gradients(ready(algorithm), batches()) for algorithm in (SAGM(rho=0.0, alpha=0.0), ERM()))
    assert_same(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weights_come_back_bit_for_bit(dtype):
    algorithm, data = ready(SAGM(rho=0.3, alpha=0.2), dtype=dtype), batches(dtype=dtype)
    before = {name: value.clone() for name, value in algorithm.state_dict().items()}
    gradients(algorithm, data)
    assert all(torch.equal(value, before[name]) for name, value in algorithm.state_dict().items())


@pytest.mark.parametrize("name", ["rho", "alpha"])
def test_negative_values_are_refused(name):
    with pytest.raises(UserError, match=rf"algorithm.{name}: found -1.0, expected a number in"):
        SAGM(**{"rho": 0.1, "alpha": 0.1} | {name: -1.0})
