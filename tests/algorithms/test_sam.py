"""SAM against its equation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, ready
from torch import Tensor, nn

from gsdg.algorithms import ERM, SAM
from gsdg.batch import join
from gsdg.errors import UserError


def joint_risk(model: nn.Module, data) -> Tensor:
    joint = join(data)
    return F.cross_entropy(model(joint.images), joint.labels)


def moved(model: nn.Module, data, scale) -> nn.Module:
    """A copy, whose weights are those + scale(|g|) * g."""
    found = gradients_of(model, joint_risk(model, data))
    norm = sum((g**2).sum() for g in found.values()).sqrt()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p += scale(norm) * found[name]
    return other


def test_the_gradient_is_that_of_the_ascended_weights():
    data = [*batches(2), *batches(1, images=7)]
    other = moved(classifier(), data, lambda norm: 0.3 / norm)
    algorithm = ready(SAM(rho=0.3))
    assert_same(gradients(algorithm, data), gradients_of(other, joint_risk(other, data)), rtol=1e-9, atol=1e-12)
    algorithm.zero_grad()
    metrics = algorithm.backward(data)
    torch.testing.assert_close(metrics["loss"], joint_risk(other, data).detach())
    torch.testing.assert_close(metrics["nll"], joint_risk(classifier(), data).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weights_come_back_bit_for_bit(dtype):
    algorithm, data = ready(SAM(rho=0.3), dtype=dtype), batches(dtype=dtype)
    before = {name: value.clone() for name, value in algorithm.state_dict().items()}
    gradients(algorithm, data)
    assert all(torch.equal(value, before[name]) for name, value in algorithm.state_dict().items())


def test_rho_0_is_erm_exactly():
    assert_same(gradients(ready(SAM(rho=0.0)), batches()), gradients(ready(ERM()), batches()), rtol=0, atol=0)


def test_a_gradient_of_zero_moves_nothing():
    """One logit is so large that every image is certain, and right: 0 / 0 would be NaN."""
    algorithm = ready(SAM(rho=0.3))
    with torch.no_grad():
        algorithm.model.head.bias[0] = 1e4
    certain = [batch._replace(labels=torch.zeros_like(batch.labels)) for batch in batches()]
    assert all((grad == 0).all() for grad in gradients(algorithm, certain).values())


def test_a_frozen_layer_is_neither_moved_nor_trained():
    algorithm = ready(SAM(rho=0.3))
    algorithm.model.head.bias.requires_grad_(False)
    assert "head.bias" not in gradients(algorithm, batches())


def test_a_negative_rho_is_refused():
    with pytest.raises(UserError, match=r"algorithm.rho: found -1.0, expected a number in"):
        SAM(rho=-1.0)
