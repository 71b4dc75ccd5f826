"""DANN and CDANN against their equation: which network is updated when, and in which direction."""

from __future__ import annotations

import itertools

import pytest
import torch
from algorithm_cases import (
    CLASSES,
    assert_same,
    batches,
    gradients,
    gradients_of,
    made,
    ready,
    risk,
    slopes,
    unequal_batches,
)
from torch import Tensor

from gsdg.algorithms import CDANN, DANN, dann

OPTIONS = {
    "adversary_weight": 0.7,
    "d_steps_per_g_step": 1,
    "grad_penalty": 0.0,
    "beta1": 0.5,
    "discriminator_lr": None,
    "discriminator_weight_decay": None,
    "mlp_width": 7,
    "mlp_depth": 3,
    "mlp_dropout": 0.0,
}
W = OPTIONS["adversary_weight"]


def game(kind=DANN, **options) -> DANN:
    return ready(kind(**OPTIONS | options))


def without_class(missing: int):
    """Unequal minibatches in which one class is missing and the others have unequal numbers of images."""
    data = unequal_batches(4, 3, 2)
    return [batch._replace(labels=torch.where(batch.labels == missing, 2, batch.labels)) for batch in data]


def disc_loss(algorithm, data, penalty: float) -> Tensor:
    """U, image by image: the sum of share times cross-entropy, and the mean squared slope times `penalty`.

    In DANN each image has the same share, in CDANN each class; there the discriminator sees features + embedding.
    """
    labels = [int(y) for batch in data for y in batch.labels]
    total, squares = 0, []
    for d, batch in enumerate(data):
        for image, y in zip(batch.images, batch.labels, strict=True):
            seen, share = algorithm.model.featurize(image[None])[0], 1 / len(labels)
            if isinstance(algorithm, CDANN):
                seen, share = seen + algorithm.embeddings.weight[y], 1 / (CLASSES * labels.count(int(y)))
            logits = algorithm.discriminator(seen)
            loss = logits.exp().sum().log() - logits[d]
            (slope,) = torch.autograd.grad(loss, seen, create_graph=True)
            total, squares = total + share * loss, [*squares, (slope**2).sum()]
    return total + penalty * sum(squares) / len(squares)


def nll(algorithm, data) -> Tensor:
    images = sum(len(batch.labels) for batch in data)
    return sum(len(batch.labels) * risk(algorithm.model, batch) for batch in data) / images


def both_gradients(algorithm, data) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of the model and of its adversary after one `backward`."""
    of_model = gradients(algorithm, data)
    return of_model, {name: p.grad.clone() for name, p in adversary_of(algorithm).items() if p.grad is not None}


def adversary_of(algorithm) -> dict[str, Tensor]:
    return {name: p for name, p in algorithm.named_parameters() if not name.startswith("model.")}


@pytest.mark.parametrize("kind", [DANN, CDANN])
@pytest.mark.parametrize("d_steps", [0, 1])
def test_the_models_step_climbs_what_the_discriminators_step_descends(kind, d_steps):
    """Without steps for the discriminator alone each step updates both."""
    for penalty, missing in itertools.product((0.0, 30.0), (1, CLASSES - 1)):
        data = without_class(missing)
        algorithm = game(kind, grad_penalty=penalty, d_steps_per_g_step=d_steps)
        expected = nll(algorithm, data) - W * disc_loss(algorithm, data, penalty)
        of_model = gradients_of(algorithm.model, expected)
        of_adversary = slopes(adversary_of(algorithm), disc_loss(algorithm, data, penalty))
        assert ("embeddings.weight" in of_adversary) == (kind is CDANN)
        for done in (0, 1):
            algorithm.turns.done = done
            actual = both_gradients(algorithm, data)
            assert_same(actual[0], of_model if done == 0 or d_steps == 0 else {})
            assert_same(actual[1], of_adversary if done == 1 or d_steps == 0 else {})


def test_the_metrics_are_the_same_in_each_turn():
    data, algorithm = batches(), game(grad_penalty=2.0)
    cross_entropy, loss = nll(algorithm, data), disc_loss(algorithm, data, 2.0)
    expected = {"loss": cross_entropy - W * loss, "nll": cross_entropy, "disc_loss": loss}
    for done in (0, 1):
        algorithm.turns.done = done
        assert_same(algorithm.backward(data), {name: value.detach() for name, value in expected.items()})


def test_the_order_of_turns_is_domainbeds_and_part_of_the_state():
    data = batches()
    for d_steps, expected in [(1, "MDMDMDMD"), (2, "DMDDMDDM"), (3, "DDMDDDMD")]:
        algorithm, moved = game(d_steps_per_g_step=d_steps), ""
        for _ in expected:
            resumed = game(d_steps_per_g_step=d_steps)
            resumed.load_state_dict(algorithm.state_dict())
            algorithm = resumed
            of_model, of_adversary = both_gradients(algorithm, data)
            assert bool(of_model) != bool(of_adversary)
            moved += "M" if of_model else "D"
            algorithm.step(torch.optim.Adam(algorithm.parameter_groups()))
        assert moved == expected


def test_one_adam_moves_both_as_two_would():
    data, algorithm, twin = batches(), game(d_steps_per_g_step=2), game(d_steps_per_g_step=2)
    joint = torch.optim.Adam(algorithm.parameter_groups(), lr=0.01, weight_decay=0.1)
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.5, 0.9)}
    of_model = torch.optim.Adam(twin.model.parameters(), **options)
    of_adversary = torch.optim.Adam(twin.discriminator.parameters(), **options)
    for optimizer in (of_adversary, of_model, of_adversary, of_adversary, of_model):
        algorithm.zero_grad(set_to_none=True)
        algorithm.backward(data)
        algorithm.step(joint)
        twin.zero_grad()
        loss = disc_loss(twin, data, 0.0)
        (loss if optimizer is of_adversary else nll(twin, data) - W * loss).backward()
        optimizer.step()
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
    monkeypatch.setattr(dann, "gradient_penalty", None)
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


def test_what_is_null_is_the_optimizers_setting():
    for beta1, lr, decay in itertools.product([None, 0.0], [None, 0.3], [None, 0.2]):
        algorithm = game(beta1=beta1, discriminator_lr=lr, discriminator_weight_decay=decay)
        optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=0.1, weight_decay=0.4)
        model, adversary = optimizer.param_groups
        assert [model[key] for key in ("lr", "weight_decay")] == [0.1, 0.4]
        assert [adversary[key] for key in ("lr", "weight_decay")] == [lr or 0.1, decay or 0.4]
        assert model["betas"] == adversary["betas"] == ((0.9, 0.999) if beta1 is None else (0.0, 0.9))
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert trained == {id(p) for p in algorithm.parameters()}


def test_the_discriminator_follows_the_optimizer_until_it_is_given_its_own():
    follows = made("dann", "optimizer.lr=0.25", "optimizer.weight_decay=0.5")
    assert follows.discriminator_settings == {"lr": 0.25, "weight_decay": 0.5}
    set_apart = made("dann", "algorithm.discriminator_lr=0.125")
    assert set_apart.discriminator_settings == {"lr": 0.125, "weight_decay": 0.0}


def test_a_class_that_is_missing_has_no_share():
    algorithm, data = game(CDANN), without_class(CLASSES - 1)
    torch.nn.init.zeros_(algorithm.discriminator[-1].weight)
    torch.nn.init.zeros_(algorithm.discriminator[-1].bias)  # chance: log 3 for every image
    present = len({int(y) for batch in data for y in batch.labels})
    assert present < CLASSES
    expected = present / CLASSES * torch.tensor(3.0, dtype=torch.float64).log()
    torch.testing.assert_close(algorithm.backward(data)["disc_loss"], expected)


def test_the_embeddings_are_trained_as_the_discriminator_is():
    algorithm = game(CDANN, discriminator_lr=0.3)
    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=0.1)
    assert algorithm.embeddings.weight.shape == (CLASSES, algorithm.model.features)
    groups = [g for g in optimizer.param_groups if any(p is algorithm.embeddings.weight for p in g["params"])]
    assert [group["lr"] for group in groups] == [0.3]
