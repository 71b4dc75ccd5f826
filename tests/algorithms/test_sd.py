"""Spectral decoupling against its equation."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from algorithm_cases import CLASSES, assert_same, classifier, gradients, gradients_of, ready, unequal_batches
from torch import Tensor

from gsdg.algorithms import SD


def objective(model, batch, weight: float) -> Tensor:
    logits = model(batch.images)
    return F.cross_entropy(logits, batch.labels) + weight * (logits * logits).sum() / (len(logits) * CLASSES)


def test_the_penalty_is_the_mean_squared_logit_and_domains_count_equally():
    data, model, algorithm = unequal_batches(4, 4, 7), classifier(), ready(SD(penalty_weight=3.0))
    expected = sum(objective(model, batch, 3.0) for batch in data) / 3
    assert_same(gradients(algorithm, data), gradients_of(model, expected))
    assert algorithm.backward(data)["loss"].item() == pytest.approx(expected.item(), rel=1e-12)
