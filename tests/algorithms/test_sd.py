"""Spectral decoupling against its equation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import CLASSES, assert_same, batches, classifier, gradients, gradients_of, ready
from torch import Tensor

from gsdg.algorithms import SD
from gsdg.errors import UserError


def joint(model, data, weight: float) -> Tensor:
    """DomainBed's form: of all images at once."""
    logits, labels = model(torch.cat([b.images for b in data])), torch.cat([b.labels for b in data])
    return F.cross_entropy(logits, labels) + weight * (logits * logits).sum() / (len(labels) * CLASSES)


def test_the_penalty_is_the_mean_squared_logit():
    data, model, algorithm = batches(), classifier(), ready(SD(penalty_weight=3.0))
    assert_same(gradients(algorithm, data), gradients_of(model, joint(model, data, 3.0)))
    assert algorithm.backward(data)["loss"].item() == pytest.approx(joint(model, data, 3.0).item(), rel=1e-12)


def test_without_penalty_it_is_erm():
    data, model = batches(), classifier()
    erm = gradients_of(model, joint(model, data, 0.0))
    assert_same(gradients(ready(SD(penalty_weight=0.0)), data), erm, rtol=1e-12, atol=1e-14)


def test_domains_count_equally_whatever_their_images():
    data, model = [*batches(2), *batches(1, images=7, seed=2)], classifier()
    expected = gradients_of(model, sum(joint(model, [batch], 3.0) for batch in data) / 3)
    assert_same(gradients(ready(SD(penalty_weight=3.0)), data), expected)


def test_a_negative_weight_is_refused():
    with pytest.raises(UserError, match=r"algorithm\.penalty_weight: found -0\.5, expected a number in"):
        SD(penalty_weight=-0.5)
