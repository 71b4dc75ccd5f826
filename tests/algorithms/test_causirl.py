"""CausIRL with either distance against its equation."""

from __future__ import annotations

import numpy as np
import pytest
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, made, ready, seed_all
from distance_cases import draw, explicit_mmd, explicit_moments, features, mixtures, objective, unequal

from gsdg.algorithms import ERM, CausIRLCORAL, CausIRLMMD
from gsdg.errors import UserError

SIZES = (5, 4, 3)
DISTANCES = {CausIRLMMD: explicit_mmd, CausIRLCORAL: explicit_moments}
either = pytest.mark.parametrize("kind", DISTANCES)


@either
@pytest.mark.parametrize("cuts", [(2, 3, 1), (0, 2, 0), (4, 3, 0), (0, 0, 2)])
def test_the_penalty_is_the_distance_of_two_mixtures(monkeypatch, kind, cuts):
    data, model = unequal(batches(images=5)), classifier()
    penalty = DISTANCES[kind](*mixtures(features(model, data), cuts))
    draw(monkeypatch, cuts, SIZES)
    found = gradients(ready(kind(penalty_weight=3.0)), data)
    assert_same(found, gradients_of(model, objective(model, data, penalty, 3.0)))


@either
def test_the_cuts_are_numpys_next_draws_one_a_domain(kind):
    data, model = batches(images=6), classifier()
    seed_all(4)
    cuts = [np.random.randint(0, 6) for _ in data]
    assert len(set(cuts)) > 1
    penalty = DISTANCES[kind](*mixtures(features(model, data), cuts))
    found = gradients(ready(kind(penalty_weight=1.0)), data, seed=4)
    assert_same(found, gradients_of(model, objective(model, data, penalty, 1.0)))


@either
@pytest.mark.parametrize("cuts", [(0, 0, 0), (1, 0, 0), (0, 0, 1)])
def test_a_mixture_of_fewer_than_2_images_has_no_penalty(monkeypatch, kind, cuts):
    data, algorithm = unequal(batches(images=5)), ready(kind(penalty_weight=3.0))
    draw(monkeypatch, cuts, SIZES)
    assert algorithm.backward(data)["penalty"].item() == 0
    draw(monkeypatch, cuts, SIZES)
    assert_same(gradients(algorithm, data), gradients(ready(ERM()), data), rtol=1e-12, atol=1e-14)


@either
def test_of_one_image_a_domain_it_is_erm(kind):
    """All are in the second mixture: a cut is never the whole batch."""
    data = batches(images=1)
    found, expected = gradients(ready(kind(penalty_weight=3.0)), data), gradients(ready(ERM()), data)
    assert_same(found, expected, rtol=1e-12, atol=1e-14)


@either
def test_without_penalty_it_is_erm(kind):
    data = unequal(batches(images=5))
    found, expected = gradients(ready(kind(penalty_weight=0.0)), data), gradients(ready(ERM()), data)
    assert_same(found, expected, rtol=1e-12, atol=1e-14)


@either
def test_a_negative_weight_is_refused(kind):
    with pytest.raises(UserError, match="algorithm.penalty_weight: found -1.0, expected a number in"):
        kind(penalty_weight=-1.0)


@pytest.mark.parametrize("name", ["causirl_mmd", "causirl_coral"])
def test_the_config(compose, name):
    assert made(compose, name).penalty_weight == 1.0
