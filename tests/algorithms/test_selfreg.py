"""SelfReg against its equation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, ready, risk, seed_all
from torch import Tensor, nn

from gsdg.algorithms import SelfReg
from gsdg.algorithms.selfreg import partners, projection
from gsdg.batch import Batch, join
from gsdg.errors import UserError

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


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("confident", [False, True])
def test_the_loss_is_the_equations(seed, confident):
    data = [Batch(b.images[:size], b.labels[:size], b.domain) for b, size in zip(batches(), (4, 2, 3), strict=True)]
    model, algorithm = classifier(), ready(selfreg())
    if confident:  # a cross-entropy below 1 scales the penalty down
        for own in (model, algorithm.model):
            own.head.weight.data.mul_(10)
        data = [Batch(b.images, model(b.images).argmax(1), b.domain) for b in data]
    mix, first, second = drawn(data, seed)
    assert first != second
    expected = objective(model, algorithm.projection, data, mix, first, second)
    assert_same(gradients(algorithm, data, seed=seed), gradients_of(model, expected))
    seed_all(seed)
    metrics = algorithm.backward(data)
    torch.testing.assert_close(metrics["loss"], expected.detach())
    assert (metrics["nll"] < 1) == confident


def test_the_projection_has_the_gradient_of_the_loss_too():
    data, model, algorithm = batches(), classifier(), ready(selfreg())
    expected = torch.autograd.grad(
        objective(model, algorithm.projection, data, *drawn(data, 0)), list(algorithm.projection.parameters())
    )
    gradients(algorithm, data, seed=0)
    for parameter, grad in zip(algorithm.projection.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_partners_are_of_the_same_class_and_each_is_taken_once():
    for seed, labels in enumerate(([3, 1, 4, 1, 3, 3, 2], [0, 0, 0, 0], [5, 4, 3], [2])):
        torch.manual_seed(seed)
        labels = torch.tensor(labels)
        pair = partners(labels)
        assert torch.equal(labels[pair], labels)
        assert sorted(pair.tolist()) == list(range(len(labels)))


def test_every_permutation_of_each_class_is_equally_likely():
    torch.manual_seed(0)
    labels, draws = torch.tensor([7, 2, 7, 2, 7]), 2400
    found = Counter(tuple(partners(labels).tolist()) for _ in range(draws))
    assert len(found) == 12  # 3! of class 7 with 2! of class 2
    assert all(abs(count - draws / 12) < 5 * (draws / 12) ** 0.5 for count in found.values())


def test_with_weights_of_0_it_is_erm():
    data, model = batches(), classifier()
    found = gradients(ready(selfreg(logit_weight=0.0, feature_weight=0.0)), data)
    expected = gradients_of(model, sum(risk(model, batch) for batch in data) / len(data))
    assert_same(found, expected, rtol=1e-12, atol=1e-14)


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
        shapes = {size: [tuple(layer.weight.shape) for layer in projection(size)[0::3]] for size in (512, 2048)}
    assert shapes == {512: [(1024, 512), (1024, 1024), (512, 1024)], 2048: [(2048, 2048)] * 3}


def test_a_saved_state_goes_on_the_same():
    data, algorithm = batches(), ready(selfreg())
    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=0.01)
    for seed in range(2):
        gradients(algorithm, data, seed=seed)
        algorithm.step(optimizer)
    fresh = ready(selfreg())
    fresh.load_state_dict(algorithm.state_dict())
    assert_same(gradients(fresh, data, seed=2), gradients(algorithm, data, seed=2), rtol=0, atol=0)
    assert torch.equal(fresh.projection[1].running_mean, algorithm.projection[1].running_mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logit_weight": -1.0}, "algorithm.logit_weight: found -1.0, expected a number in \\[0, inf\\)."),
        ({"feature_weight": float("nan")}, "algorithm.feature_weight: found nan, expected a number in \\[0, inf\\)."),
        ({"alpha": 0.0}, "algorithm.alpha: found 0.0, expected a number in \\(0, inf\\)."),
    ],
)
def test_values_that_mean_nothing_are_refused(change, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        selfreg(**change)
