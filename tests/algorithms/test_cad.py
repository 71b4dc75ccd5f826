"""CAD and CondCAD against their equation."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, made, ready, risk
from torch import Tensor

from gsdg.algorithms import CAD
from gsdg.batch import Batch, join
from gsdg.errors import UserError

DEFAULTS = {"penalty_weight": 0.7, "temperature": 0.3, "conditional": False, "flipped": True}
DEFAULTS |= {"normalized": False, "project": False}
# Class 0 has several images in every domain, class 1 two in one domain, class 2 one in each of two, class 4 one in all.
LABELS = [[0, 0, 1, 2, 1], [0, 2, 0], [0, 0, 4, 0]]


def cad(**changes) -> CAD:
    return CAD(**DEFAULTS | changes)


def labelled(labels: list[list[int]], dtype: torch.dtype = torch.float64) -> list[Batch]:
    drawn = batches(len(labels), max(map(len, labels)), dtype=dtype)
    return [Batch(b.images[: len(y)], torch.tensor(y), b.domain) for b, y in zip(drawn, labels, strict=True)]


def bottleneck(z: Tensor, labels: list[list[int]], temperature: float, conditional: bool, flipped: bool) -> Tensor:
    """Image by image and pair by pair; every sum from its own list."""
    images = [(d, y) for d, own in enumerate(labels) for y in own]
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


@pytest.mark.parametrize(("conditional", "flipped", "normalized"), list(product([False, True], repeat=3)))
def test_the_penalty_is_the_mean_log_share_of_the_pairs_that_are_asked_for(conditional, flipped, normalized):
    data, model = labelled(LABELS), classifier()
    joint = join(data)
    features = model.featurize(joint.images)
    z = features / features.pow(2).sum(1, keepdim=True).sqrt() if normalized else features
    penalty = bottleneck(z, LABELS, 0.3, conditional, flipped)
    expected = F.cross_entropy(model.head(features), joint.labels) + 0.7 * penalty

    algorithm = ready(cad(conditional=conditional, flipped=flipped, normalized=normalized))
    assert_same(gradients(algorithm, data), gradients_of(model, expected))
    metrics = algorithm.backward(data)
    torch.testing.assert_close(metrics["penalty"], penalty.detach())
    torch.testing.assert_close(metrics["loss"], expected.detach())


def test_the_names_of_the_configs(compose):
    plain, conditional = made(compose, "cad"), made(compose, "condcad")
    assert (plain.conditional, conditional.conditional) == (False, True)
    assert plain.flipped
    assert conditional.flipped


@pytest.mark.parametrize("conditional", [False, True])
def test_with_weight_0_it_is_erm(conditional):
    data, model = batches(), classifier()
    found = gradients(ready(cad(penalty_weight=0.0, conditional=conditional)), data)
    expected = gradients_of(model, sum(risk(model, batch) for batch in data) / len(data))
    assert_same(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("conditional", "flipped"), list(product([False, True], repeat=2)))
def test_a_batch_without_pairs_has_no_penalty(conditional, flipped):
    data, model = labelled([[0], [1], [2]]), classifier()
    algorithm = ready(cad(conditional=conditional, flipped=flipped))
    expected = gradients_of(model, sum(risk(model, batch) for batch in data) / 3)
    assert_same(gradients(algorithm, data), expected, rtol=1e-12, atol=1e-14)
    assert algorithm.backward(data)["penalty"] == 0


@pytest.mark.parametrize("spread", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize(("conditional", "flipped"), list(product([False, True], repeat=2)))
def test_features_of_any_size_have_finite_gradients_in_float32(conditional, flipped, spread):
    algorithm = ready(cad(conditional=conditional, flipped=flipped, temperature=0.05), dtype=torch.float32)
    features = (spread * torch.randn(12, 6)).requires_grad_()
    labels, domains = (
        torch.tensor([label for own in LABELS for label in own]),
        torch.tensor([0] * 5 + [1] * 3 + [2] * 4),
    )
    penalty = algorithm.bottleneck(features, labels, domains)
    penalty.backward()
    assert penalty.isfinite()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("conditional", [False, True])
def test_large_similarities_that_float32_holds_exactly_lose_no_digits(conditional):
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(2, (24, 5), generator=generator) - 1
    features = torch.cat([torch.full((24, 1), 1000), signs], dim=1)  # their products: a million and a digit
    labels, domains = torch.randint(3, (24,), generator=generator), torch.arange(24) % 3
    found = []
    for dtype in (torch.float32, torch.float64):
        z = features.to(dtype).requires_grad_()
        ready(cad(conditional=conditional, temperature=1.0), dtype=dtype).bottleneck(z, labels, domains).backward()
        found.append(z.grad[:, 1:].double())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_shows():
    algorithm = ready(cad())
    features = torch.full((4, 6), math.nan, dtype=torch.float64)
    assert algorithm.bottleneck(features, torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 1, 1])).isnan()


def test_the_projection_comes_before_the_normalisation_and_is_trained_and_saved():
    data, model = labelled(LABELS), classifier()
    algorithm = ready(cad(project=True, normalized=True))
    first, _, second = algorithm.projection
    assert (first.in_features, first.out_features, second.out_features) == (6, 6, 128)
    joint = join(data)
    features = model.featurize(joint.images)
    z = torch.relu(features @ first.weight.T + first.bias) @ second.weight.T + second.bias
    penalty = bottleneck(z / z.pow(2).sum(1, keepdim=True).sqrt(), LABELS, 0.3, False, True)
    expected = F.cross_entropy(model.head(features), joint.labels) + 0.7 * penalty
    assert_same(gradients(algorithm, data), gradients_of(model, expected))

    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=0.1)
    before = first.weight.clone()
    algorithm.step(optimizer)
    assert not torch.equal(first.weight, before)
    fresh = ready(cad(project=True, normalized=True))
    fresh.load_state_dict(algorithm.state_dict())
    assert_same(gradients(fresh, data), gradients(algorithm, data), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "algorithm.temperature: found 0.0, expected a number in \\(0, inf\\)."),
        ({"temperature": math.nan}, "algorithm.temperature: found nan, expected a number in \\(0, inf\\)."),
        ({"penalty_weight": -1.0}, "algorithm.penalty_weight: found -1.0, expected a number in \\[0, inf\\)."),
    ],
)
def test_values_that_mean_nothing_are_refused(change, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        cad(**change)
