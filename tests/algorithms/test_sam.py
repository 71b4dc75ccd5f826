"""SAM and SAGM against their equations."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, ready
from torch import Tensor, nn

from gsdg.algorithms import ERM, SAGM, SAM
from gsdg.types import join


def joint_risk(model: nn.Module, data) -> Tensor:
    joint = join(data)
    return F.cross_entropy(model(joint.images), joint.labels)


def moved(model: nn.Module, data, scale) -> nn.Module:
    """A copy with the weights theta + scale(|g|) * g."""
    grads = gradients_of(model, joint_risk(model, data))
    norm = sum((g**2).sum() for g in grads.values()).sqrt()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p += scale(norm) * grads[name]
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


def test_rho_0_is_erm_exactly():
    assert_same(gradients(ready(SAM(rho=0.0)), batches()), gradients(ready(ERM()), batches()), rtol=0, atol=0)


def test_a_gradient_of_zero_moves_nothing():
    """One logit is so large that every image is certain, and right: 0 / 0 would be NaN."""
    algorithm = ready(SAM(rho=0.3))
    with torch.no_grad():
        algorithm.model.head.bias[0] = 1e4
    certain = [batch._replace(labels=torch.zeros_like(batch.labels)) for batch in batches()]
    assert all((grad == 0).all() for grad in gradients(algorithm, certain).values())


def test_sagms_gradient_is_the_mean_of_those_at_both_weights():
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


def test_sagm_with_alpha_0_is_the_mean_of_erm_and_sam():
    erm, sam = (gradients(ready(algorithm), batches()) for algorithm in (ERM(), SAM(rho=0.3)))
    expected = {name: (erm[name] + sam[name]) / 2 for name in erm}
    assert_same(gradients(ready(SAGM(rho=0.3, alpha=0.0)), batches()), expected, rtol=1e-12, atol=1e-15)
