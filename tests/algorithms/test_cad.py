"""CAD and CondCAD against their equation."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, made, ready
from torch import Tensor

from gsdg.algorithms import CAD, ERM
from gsdg.types import Batch, join

DEFAULTS = {"penalty_weight": 0.7, "temperature": 0.3, "conditional": False, "flipped": True}
DEFAULTS |= {"normalized": False, "project": False}
# Class 0 has several images in every domain, class 1 two in one domain, class 2 one in each of two, class 4 one in all.
LABELS = [[0, 0, 1, 2, 1], [0, 2, 0], [0, 0, 4, 0]]


def cad(**changes) -> CAD:
    return CAD(**DEFAULTS | changes)


def labelled(labels: list[list[int]]) -> list[Batch]:
    drawn = batches(len(labels), max(map(len, labels)))
    return [Batch(b.images[: len(y)], torch.tensor(y), b.domain) for b, y in zip(drawn, labels, strict=True)]


def bottleneck(z: Tensor, labels: list[list[int]], temperature: float, conditional: bool, flipped: bool) -> Tensor:
    """Image by image and pair by pair; every sum from its own list."""
    images = [(d, y) for d, domain_labels in enumerate(labels) for y in domain_labels]
    total, count = torch.zeros((), dtype=z.dtype), 0
    for i, (domain, label) in enumerate(images):
        alone, everyone, asked = True, [], []
        for j, (other_domain, other_label) in enumerate(images):
            if i == j:
                continue
            alone = alone and other_label != label
            if conditional and other_label != label:
                continue
            term = ((z[i] * z[j]).sum() / temperature).exp()
            everyone.append(term)
            if (other_domain != domain) == flipped:
                asked.append(term)
        if not alone and asked:
            total = total + (-1 if flipped else 1) * temperature / 0.07 * (sum(asked) / sum(everyone)).log()
            count += 1
    return total / count


def normalize(z: Tensor) -> Tensor:
    return z / z.pow(2).sum(1, keepdim=True).sqrt()


BOTH = (False, True)


@pytest.mark.parametrize(("conditional", "flipped"), product(BOTH, BOTH))
def test_the_penalty_is_the_mean_log_share_of_the_pairs_that_are_asked_for(conditional, flipped):
    data, model = labelled(LABELS), classifier()
    joint = join(data)
    for normalized in BOTH:
        features = model.featurize(joint.images)
        penalty = bottleneck(normalize(features) if normalized else features, LABELS, 0.3, conditional, flipped)
        expected = F.cross_entropy(model.head(features), joint.labels) + 0.7 * penalty
        algorithm = ready(cad(conditional=conditional, flipped=flipped, normalized=normalized))
        assert_same(gradients(algorithm, data), gradients_of(model, expected))
        metrics = algorithm.backward(data)
        torch.testing.assert_close(metrics["penalty"], penalty.detach())
        torch.testing.assert_close(metrics["loss"], expected.detach())


@pytest.mark.parametrize(("conditional", "flipped"), product(BOTH, BOTH))
def test_a_batch_without_pairs_has_no_penalty_and_features_of_any_size_have_finite_gradients(conditional, flipped):
    data, options = labelled([[0], [1], [2]]), {"conditional": conditional, "flipped": flipped}
    algorithm = ready(cad(**options))
    assert_same(gradients(algorithm, data), gradients(ready(ERM()), data), rtol=1e-12, atol=1e-14)
    assert algorithm.backward(data)["penalty"] == 0
    labels = torch.tensor([label for domain_labels in LABELS for label in domain_labels])
    domains = torch.tensor([0] * 5 + [1] * 3 + [2] * 4)
    for spread in (1e-4, 1.0, 1e4):
        algorithm = ready(cad(temperature=0.05, **options), dtype=torch.float32)
        features = (spread * torch.randn(12, 6)).requires_grad_()
        penalty = algorithm.bottleneck(features, labels, domains)
        penalty.backward()
        assert penalty.isfinite(), spread
        assert features.grad.isfinite().all(), spread


def test_the_names_of_the_configs():
    plain, conditional = made("cad"), made("condcad")
    assert (plain.conditional, conditional.conditional) == (False, True)
    assert plain.flipped
    assert conditional.flipped


def test_large_similarities_that_float32_holds_exactly_lose_no_digits():
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(2, (24, 5), generator=generator) - 1
    features = torch.cat([torch.full((24, 1), 1000), signs], dim=1)  # their products: a million and a digit
    labels, domains = torch.randint(3, (24,), generator=generator), torch.arange(24) % 3
    for conditional in BOTH:
        grads = []
        for dtype in (torch.float32, torch.float64):
            z = features.to(dtype).requires_grad_()
            ready(cad(conditional=conditional, temperature=1.0), dtype=dtype).bottleneck(z, labels, domains).backward()
            grads.append(z.grad[:, 1:].double())
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_shows():
    algorithm = ready(cad())
    features = torch.full((4, 6), math.nan, dtype=torch.float64)
    assert algorithm.bottleneck(features, torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 1, 1])).isnan()


def test_the_projection_comes_before_the_normalization_and_is_trained():
    data, model = labelled(LABELS), classifier()
    algorithm = ready(cad(project=True, normalized=True))
    first, _, second = algorithm.projection
    assert (first.in_features, first.out_features, second.out_features) == (6, 6, 128)
    joint = join(data)
    features = model.featurize(joint.images)
    z = torch.relu(features @ first.weight.T + first.bias) @ second.weight.T + second.bias
    penalty = bottleneck(normalize(z), LABELS, 0.3, False, True)
    expected = F.cross_entropy(model.head(features), joint.labels) + 0.7 * penalty
    assert_same(gradients(algorithm, data), gradients_of(model, expected))
    before = first.weight.clone()
    algorithm.step(torch.optim.Adam(algorithm.parameter_groups(), lr=0.1))
    assert not torch.equal(first.weight, before)
