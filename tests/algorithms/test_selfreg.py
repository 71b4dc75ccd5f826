"""SelfReg against its equation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import (
    assert_same,
    batches,
    classifier,
    gradients,
    gradients_of,
    ready,
    seed_all,
    slopes,
    unequal_batches,
)
from torch import Tensor, nn

from gsdg.algorithms import SelfReg
from gsdg.algorithms.selfreg import partners, perturbation_layer
from gsdg.types import Batch, join

DEFAULTS = {"logit_weight": 0.8, "feature_weight": 0.3, "alpha": 0.5, "train_projection": True}


def selfreg(**changes) -> SelfReg:
    return SelfReg(**DEFAULTS | changes)


def projected(layers: nn.Sequential, rows: Tensor) -> Tensor:
    """The projection by hand: batch statistics, biased variance, no ReLU at the end."""
    linear, norm = layers[0::3], layers[1::3]
    for k in range(3):
        rows = rows @ linear[k].weight.T + linear[k].bias
        rows = (rows - rows.mean(0)) / ((rows - rows.mean(0)).pow(2).mean(0) + 1e-5).sqrt()
        rows = rows * norm[k].weight + norm[k].bias
        rows = rows.relu() if k < 2 else rows
    return rows


def objective(model, layers: nn.Sequential, data, mix: float, first: list[int], second: list[int]) -> Tensor:
    """Image by image, number by number."""
    joint = join(data)
    features = model.featurize(joint.images)
    logits, partner = model.head(features), projected(layers, features)
    penalty = 0
    for weight, rows, others in ((0.8, logits, logits), (0.3, features, partner)):
        count = rows.numel()
        for i in range(rows.shape[0]):
            p, q = others[first[i]], others[second[i]]
            for k in range(rows.shape[1]):
                individual = (rows[i, k] - p[k]) ** 2 / count
                heterogeneous = (rows[i, k] - mix * p[k] - (1 - mix) * q[k]) ** 2 / count
                penalty = penalty + weight * (mix * individual + (1 - mix) * heterogeneous)
    nll = F.cross_entropy(logits, joint.labels)
    return nll + min(nll.item(), 1.0) * penalty


def drawn(data, seed: int) -> tuple[float, list[int], list[int]]:
    """What a `backward` draws after `seed_all(seed)`."""
    seed_all(seed)
    labels = join(data).labels
    return np.random.beta(0.5, 0.5), partners(labels).tolist(), partners(labels).tolist()


@pytest.mark.parametrize("confident", [False, True])
def test_the_loss_is_the_equations(confident):
    data = unequal_batches(4, 2, 3)
    model, algorithm = classifier(), ready(selfreg())
    if confident:  # a cross-entropy below 1 scales the penalty down
        for network in (model, algorithm.model):
            network.head.weight.data.mul_(10)
        data = [Batch(b.images, model(b.images).argmax(1), b.domain) for b in data]
    for seed in (0, 1):
        mix, first, second = drawn(data, seed)
        assert first != second
        expected = objective(model, algorithm.projection, data, mix, first, second)
        assert_same(gradients(algorithm, data, seed=seed), gradients_of(model, expected))
        of_projection = slopes(dict(algorithm.projection.named_parameters()), expected)
        assert_same({name: p.grad for name, p in algorithm.projection.named_parameters()}, of_projection)
        seed_all(seed)
        metrics = algorithm.backward(data)
        torch.testing.assert_close(metrics["loss"], expected.detach())
        assert (metrics["nll"] < 1) == confident


def test_partners_are_of_the_same_class_each_is_taken_once_and_every_permutation_is_equally_likely():
    for seed, labels in enumerate(([3, 1, 4, 1, 3, 3, 2], [0, 0, 0, 0], [5, 4, 3], [2])):
        torch.manual_seed(seed)
        pair = partners(torch.tensor(labels))
        assert torch.tensor(labels)[pair].tolist() == labels
        assert sorted(pair.tolist()) == list(range(len(labels)))
    torch.manual_seed(0)
    labels, draws = torch.tensor([7, 2, 7, 2, 7]), 2400
    counts = Counter(tuple(partners(labels).tolist()) for _ in range(draws))
    assert len(counts) == 12  # 3! of class 7 with 2! of class 2
    assert all(abs(count - draws / 12) < 5 * (draws / 12) ** 0.5 for count in counts.values())


def test_a_projection_that_is_not_trained_stays_and_lets_the_gradient_through():
    data, fixed, trained = batches(), ready(selfreg(train_projection=False)), ready(selfreg())
    assert_same(gradients(fixed, data), gradients(trained, data), rtol=0, atol=0)
    changed = {}
    for name, algorithm in (("fixed", fixed), ("trained", trained)):
        before = algorithm.projection[0].weight.clone()
        algorithm.step(torch.optim.SGD(algorithm.parameter_groups(), lr=0.1, weight_decay=0.1))
        changed[name] = not torch.equal(algorithm.projection[0].weight, before)
    assert changed == {"fixed": False, "trained": True}


def test_the_projection_is_twice_as_wide_inside_unless_the_features_are_a_resnet50s():
    with torch.device("meta"):
        shapes = {size: [tuple(layer.weight.shape) for layer in perturbation_layer(size)[0::3]] for size in (512, 2048)}
    assert shapes == {512: [(1024, 512), (1024, 1024), (512, 1024)], 2048: [(2048, 2048)] * 3}
