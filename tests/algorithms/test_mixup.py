"""Mixup against its equation, with the labels mixed instead of the losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import (
    CLASSES,
    assert_same,
    batches,
    classifier,
    gradients,
    gradients_of,
    ready,
    seed_all,
    unequal_batches,
)
from torch import Tensor

from gsdg.algorithms import Mixup


def objective(model, data, pairs: list[tuple[int, int]], shares: list[float]) -> Tensor:
    """-sum of mixed labels times log-probabilities of mixed images; the mean over images, then over pairs."""
    losses = []
    for (i, j), share in zip(pairs, shares, strict=True):
        of_pair = []
        for k in range(min(len(data[i].labels), len(data[j].labels))):
            image = share * data[i].images[k] + (1 - share) * data[j].images[k]
            label, other = (F.one_hot(data[d].labels[k], CLASSES) for d in (i, j))
            of_pair.append(-((share * label + (1 - share) * other) * model(image[None])[0].log_softmax(0)).sum())
        losses.append(sum(of_pair) / len(of_pair))
    return sum(losses) / len(losses)


def drawn(domains: int, alpha: float, seed: int) -> tuple[list[tuple[int, int]], list[float]]:
    """What DomainBed would draw: a permutation from torch, then a share for each pair from numpy."""
    seed_all(seed)
    order = torch.randperm(domains)
    pairs = [(int(order[k]), int(order[(k + 1) % domains])) for k in range(domains)]
    return pairs, [np.random.beta(alpha, alpha) for _ in pairs]


@pytest.mark.parametrize(("domains", "alpha"), [(2, 5.0), (3, 0.2), (4, 5.0)])
def test_each_domain_is_mixed_with_the_next_of_a_random_circle(domains, alpha):
    data, model = batches(domains), classifier()
    for seed in range(3):
        actual = gradients(ready(Mixup(alpha=alpha), domains=domains), data, seed=seed)
        assert_same(actual, gradients_of(model, objective(model, data, *drawn(domains, alpha, seed))))
    circles = {tuple(sorted(drawn(domains, alpha, seed)[0])) for seed in range(20)}
    assert len(circles) == {2: 1, 3: 2, 4: 6}[domains]


def test_of_unequal_minibatches_the_longer_is_cut():
    data, model = unequal_batches(3, 5, 2), classifier()
    actual = gradients(ready(Mixup(alpha=1.0)), data)
    assert_same(actual, gradients_of(model, objective(model, data, *drawn(3, 1.0, 0))))
