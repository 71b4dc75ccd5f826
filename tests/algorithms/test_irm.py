"""IRM against its equation."""

from __future__ import annotations

import torch.nn.functional as F
from algorithm_cases import assert_annealed, assert_same, batches, classifier, gradients, gradients_of, ready
from torch import Tensor

from gsdg.algorithms import IRM


def slope(logits: Tensor, labels: Tensor) -> Tensor:
    """d/ds of the mean cross-entropy of s * logits at s = 1, by hand: mean over images of sum_c (p_c - y_c) z_c."""
    errors = logits.softmax(1) - F.one_hot(labels, logits.shape[1])
    return (errors * logits).sum(1).mean()


def objective(model, data, weight: float) -> Tensor:
    total = 0
    for batch in data:
        logits = model(batch.images)
        penalty = slope(logits[0::2], batch.labels[0::2]) * slope(logits[1::2], batch.labels[1::2])
        total = total + F.cross_entropy(logits, batch.labels) + weight * penalty
    return total / len(data)


def test_the_penalty_is_the_product_of_both_halves_slopes():
    data, model = batches(), classifier()
    actual = gradients(ready(IRM(penalty_weight=30.0, anneal_steps=0)), data)
    assert_same(actual, gradients_of(model, objective(model, data, 30.0)))


def test_before_the_annealing_ends_the_weight_is_1_and_at_its_end_the_optimizer_is_reset():
    data = batches()
    algorithm = ready(IRM(penalty_weight=30.0, anneal_steps=2))
    assert_annealed(algorithm, data, lambda model, step: objective(model, data, 1.0 if step < 2 else 30.0))
