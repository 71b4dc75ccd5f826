"""DANN against its game: who moves when, in which direction."""

from __future__ import annotations

import itertools

import pytest
import torch
from algorithm_cases import assert_same, batches, gradients, gradients_of, made, ready
from game_cases import OPTIONS, adversary_of, both_gradients, disc_loss, nll, slopes_of

from gsdg.algorithms import DANN, ERM, dann
from gsdg.errors import UserError

W = OPTIONS["adversary_weight"]


def game(**options) -> DANN:
    return ready(DANN(**OPTIONS | options))


def uneven():
    """Domains of 4, 3 and 2 images."""
    return [batch._replace(images=batch.images[d:], labels=batch.labels[d:]) for d, batch in enumerate(batches())]


def u(algorithm, data, penalty: float) -> torch.Tensor:
    images = sum(len(batch.labels) for batch in data)
    return disc_loss(algorithm, data, lambda y: 1 / images, lambda y: 0, penalty)


@pytest.mark.parametrize("penalty", [0.0, 30.0])
def test_the_models_step_climbs_what_the_discriminators_step_descends(penalty):
    data, algorithm = uneven(), game(grad_penalty=penalty)
    of_model, of_adversary = both_gradients(algorithm, data)
    expected = nll(algorithm, data) - W * u(algorithm, data, penalty)
    assert_same(of_model, gradients_of(algorithm.model, expected))
    assert not of_adversary
    algorithm.turns.done = 1
    of_model, of_adversary = both_gradients(algorithm, data)
    assert not of_model
    assert_same(of_adversary, slopes_of(adversary_of(algorithm), u(algorithm, data, penalty)))


@pytest.mark.parametrize("penalty", [0.0, 30.0])
def test_without_turns_one_backward_serves_both(penalty):
    data, algorithm = batches(), game(d_steps_per_g_step=0, grad_penalty=penalty)
    for _ in range(2):
        of_model, of_adversary = both_gradients(algorithm, data)
        expected = u(algorithm, data, penalty)
        assert_same(of_adversary, slopes_of(adversary_of(algorithm), expected))
        assert_same(of_model, gradients_of(algorithm.model, nll(algorithm, data) - W * expected))
        algorithm.step(torch.optim.SGD(algorithm.parameter_groups(), lr=0.0))


@pytest.mark.parametrize("d_steps", [0, 1])
def test_with_a_weight_of_0_the_model_is_trained_as_by_erm(d_steps):
    data = batches()
    found = gradients(game(adversary_weight=0.0, d_steps_per_g_step=d_steps), data)
    assert_same(found, gradients(ready(ERM()), data), rtol=1e-12, atol=1e-14)


def test_what_is_recorded_is_the_same_in_each_turn():
    data, algorithm = batches(), game(grad_penalty=2.0)
    own, loss = nll(algorithm, data), u(algorithm, data, 2.0)
    for done in (0, 1):
        algorithm.turns.done = done
        found = algorithm.backward(data)
        expected = {"loss": own - W * loss, "nll": own, "disc_loss": loss}
        assert_same(found, {name: value.detach() for name, value in expected.items()})


@pytest.mark.parametrize(("d_steps", "expected"), [(1, "MDMDMDMD"), (2, "DMDDMDDM"), (3, "DDMDDDMD")])
def test_domainbeds_order_of_turns(d_steps, expected):
    data, algorithm = batches(), game(d_steps_per_g_step=d_steps)
    optimizer = torch.optim.Adam(algorithm.parameter_groups())
    moved = ""
    for _ in expected:
        of_model, of_adversary = both_gradients(algorithm, data)
        assert bool(of_model) != bool(of_adversary)
        moved += "M" if of_model else "D"
        algorithm.step(optimizer)
    assert moved == expected


def test_the_turn_is_part_of_the_state():
    data, first, second = batches(), game(d_steps_per_g_step=2), game(d_steps_per_g_step=2)
    optimizer = torch.optim.SGD(first.parameter_groups(), lr=0.1)
    for _ in range(4):
        first.zero_grad(set_to_none=True)
        first.backward(data)
        first.step(optimizer)
    second.load_state_dict(first.state_dict())
    found, expected = both_gradients(second, data), both_gradients(first, data)
    assert found[0]  # the fifth step is the model's
    assert not found[1]
    for own, other in zip(found, expected, strict=True):
        assert_same(own, other, rtol=0, atol=0)


def test_one_adam_moves_both_as_two_would():
    data, algorithm, twin = batches(), game(d_steps_per_g_step=2), game(d_steps_per_g_step=2)
    joint = torch.optim.Adam(algorithm.parameter_groups(), lr=0.01, weight_decay=0.1)
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.5, 0.9)}
    of_model = torch.optim.Adam(twin.model.parameters(), **options)
    of_adversary = torch.optim.Adam(twin.discriminator.parameters(), **options)
    for own in (of_adversary, of_model, of_adversary, of_adversary, of_model):
        algorithm.zero_grad(set_to_none=True)
        algorithm.backward(data)
        algorithm.step(joint)
        twin.zero_grad()
        loss = u(twin, data, 0.0)
        (loss if own is of_adversary else nll(twin, data) - W * loss).backward()
        own.step()
    assert_same(dict(algorithm.named_parameters()), dict(twin.named_parameters()))


def test_a_step_of_the_discriminator_does_not_differentiate_the_model(monkeypatch):
    algorithm, enabled = game(), []
    forward = algorithm.model.featurizer.forward
    monkeypatch.setattr(
        algorithm.model.featurizer, "forward", lambda x: enabled.append(torch.is_grad_enabled()) or forward(x)
    )
    for done in (0, 1):
        algorithm.turns.done = done
        algorithm.backward(batches())
    assert enabled == [True, False]


def test_a_penalty_of_0_is_not_computed(monkeypatch):
    monkeypatch.setattr(dann, "squared_slope", None)
    for done in (0, 1):
        algorithm = game()
        algorithm.turns.done = done
        algorithm.backward(batches())
    with pytest.raises(TypeError):
        game(grad_penalty=1.0).backward(batches())


def test_the_discriminators_layers():
    layers = list(game(mlp_width=9, mlp_depth=4, mlp_dropout=0.3).discriminator)
    shapes = [tuple(layer.weight.shape) for layer in layers if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(9, 6), (9, 9), (9, 9), (3, 9)]
    assert [layer.p for layer in layers if isinstance(layer, torch.nn.Dropout)] == [0.3] * 3


@pytest.mark.parametrize(("beta1", "lr", "decay"), [*itertools.product([None, 0.0], [None, 0.3], [None, 0.2])])
def test_what_is_null_is_the_optimizers_own(beta1, lr, decay):
    algorithm = game(beta1=beta1, discriminator_lr=lr, discriminator_weight_decay=decay)
    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=0.1, weight_decay=0.4)
    model, adversary = optimizer.param_groups
    assert [model[key] for key in ("lr", "weight_decay")] == [0.1, 0.4]
    assert [adversary[key] for key in ("lr", "weight_decay")] == [lr or 0.1, decay or 0.4]
    assert model["betas"] == adversary["betas"] == ((0.9, 0.999) if beta1 is None else (0.0, 0.9))
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in algorithm.parameters()
    }


def test_the_discriminator_follows_the_optimizer_until_it_is_given_its_own(compose):
    follows = made(compose, "dann", "optimizer.lr=0.25", "optimizer.weight_decay=0.5")
    assert follows.own_settings == {"lr": 0.25, "weight_decay": 0.5}
    assert made(compose, "dann", "algorithm.discriminator_lr=0.125").own_settings == {"lr": 0.125, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("adversary_weight", -1.0, r"a number in \[0, inf\)"),
        ("grad_penalty", float("nan"), r"a number in \[0, inf\)"),
        ("d_steps_per_g_step", -1, r"a number in \[0, inf\)"),
        ("discriminator_lr", -0.1, r"a number in \[0, inf\)"),
        ("discriminator_weight_decay", -0.1, r"a number in \[0, inf\)"),
        ("mlp_width", 0, r"a number in \[1, inf\)"),
        ("mlp_depth", 1, r"a number in \[2, inf\)"),
        ("mlp_dropout", 1.0, r"a number in \[0, 1\)"),
        ("beta1", 1.0, r"a number in \[0, 1\)"),
    ],
)
def test_bad_values_are_refused(key, value, expected):
    with pytest.raises(UserError, match=rf"^algorithm\.{key}: found {value}, expected {expected}\.$"):
        DANN(**OPTIONS | {key: value})
