"""MMD and CORAL against their equations."""

from __future__ import annotations

import pytest
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, made, ready
from distance_cases import explicit_mmd, explicit_moments, features, objective, over_pairs, unequal

from gsdg.algorithms import CORAL, ERM, MMD
from gsdg.errors import UserError

DISTANCES = {MMD: explicit_mmd, CORAL: explicit_moments}
either = pytest.mark.parametrize("kind", DISTANCES)


@either
@pytest.mark.parametrize("data", [batches(), unequal(batches(images=5)), batches(domains=2)], ids=len)
def test_the_penalty_is_the_mean_distance_of_pairs_of_domains(kind, data):
    model = classifier()
    found = gradients(ready(kind(penalty_weight=3.0), domains=len(data)), data)
    penalty = over_pairs(DISTANCES[kind], features(model, data))
    assert_same(found, gradients_of(model, objective(model, data, penalty, 3.0)))


@either
def test_what_is_recorded(kind):
    data, algorithm = batches(), ready(kind(penalty_weight=3.0))
    metrics = algorithm.backward(data)
    penalty = over_pairs(DISTANCES[kind], features(algorithm.model, data)).item()
    assert metrics["penalty"].item() == pytest.approx(penalty, rel=1e-9)
    assert metrics["nll"].item() == pytest.approx(objective(algorithm.model, data, 0.0, 0.0).item(), rel=1e-12)
    assert metrics["loss"].item() == pytest.approx(metrics["nll"].item() + 3 * penalty, rel=1e-9)
    assert not any(value.requires_grad for value in metrics.values())


@either
def test_without_penalty_it_is_erm(kind):
    data = unequal(batches(images=5))
    found, expected = gradients(ready(kind(penalty_weight=0.0)), data), gradients(ready(ERM()), data)
    assert_same(found, expected, rtol=1e-12, atol=1e-14)


@either
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(kind, value):
    with pytest.raises(UserError, match=f"algorithm.penalty_weight: found {value}, expected a number in"):
        kind(penalty_weight=value)


@pytest.mark.parametrize("name", ["mmd", "coral"])
def test_the_config(compose, name):
    assert made(compose, name).penalty_weight == 1.0


def test_one_image_a_domain_will_do_for_mmd():
    data, model = batches(images=1), classifier()
    penalty = over_pairs(explicit_mmd, features(model, data))
    found = gradients(ready(MMD(penalty_weight=1.0)), data)
    assert_same(found, gradients_of(model, objective(model, data, penalty, 1.0)))


def test_one_image_a_domain_is_refused_by_coral():
    with pytest.raises(UserError, match="raise trainer.batch_size"):
        ready(CORAL(penalty_weight=1.0)).backward(batches(images=1))
