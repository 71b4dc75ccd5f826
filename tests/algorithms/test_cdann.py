"""CDANN against its equation: what it adds to DANN, the classes."""

from __future__ import annotations

import pytest
import torch
from algorithm_cases import CLASSES, assert_same, batches, gradients_of, ready
from game_cases import OPTIONS, adversary_of, both_gradients, disc_loss, nll, slopes_of

from gsdg.algorithms import CDANN

W = OPTIONS["adversary_weight"]


def without(missing: int):
    """Unequal minibatches without a class, the others in unequal numbers."""
    data = [batch._replace(images=batch.images[d:], labels=batch.labels[d:]) for d, batch in enumerate(batches())]
    return [batch._replace(labels=torch.where(batch.labels == missing, 2, batch.labels)) for batch in data]


def u(algorithm, data, penalty: float) -> torch.Tensor:
    labels = [int(y) for batch in data for y in batch.labels]
    return disc_loss(
        algorithm,
        data,
        lambda y: 1 / (CLASSES * labels.count(int(y))),
        lambda y: algorithm.embeddings.weight[y],
        penalty,
    )


@pytest.mark.parametrize("missing", [1, CLASSES - 1])
@pytest.mark.parametrize("penalty", [0.0, 30.0])
@pytest.mark.parametrize("d_steps", [0, 1])
def test_every_class_has_its_share_of_the_game(missing, penalty, d_steps):
    data = without(missing)
    algorithm = ready(CDANN(**OPTIONS | {"grad_penalty": penalty, "d_steps_per_g_step": d_steps}))
    loss = u(algorithm, data, penalty)
    model = gradients_of(algorithm.model, nll(algorithm, data) - W * loss)
    adversary = slopes_of(adversary_of(algorithm), u(algorithm, data, penalty))
    assert "embeddings.weight" in adversary
    found = both_gradients(algorithm, data)
    assert_same(found[0], model)
    assert_same(found[1], {} if d_steps else adversary)
    algorithm.turns.done = 1
    found = both_gradients(algorithm, data)
    assert_same(found[0], {} if d_steps else model)
    assert_same(found[1], adversary)


def test_a_class_that_is_missing_has_no_share():
    algorithm = ready(CDANN(**OPTIONS))
    torch.nn.init.zeros_(algorithm.discriminator[-1].weight)
    torch.nn.init.zeros_(algorithm.discriminator[-1].bias)  # chance: log 3 for every image
    data = without(CLASSES - 1)
    present = len({int(y) for batch in data for y in batch.labels})
    assert present < CLASSES
    found = algorithm.backward(data)["disc_loss"]
    torch.testing.assert_close(found, present / CLASSES * torch.tensor(3.0, dtype=torch.float64).log())


def test_the_embeddings_are_the_discriminators():
    algorithm = ready(CDANN(**OPTIONS | {"discriminator_lr": 0.3}))
    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=0.1)
    assert algorithm.embeddings.weight.shape == (CLASSES, algorithm.model.features)
    (own,) = (
        group for group in optimizer.param_groups if any(p is algorithm.embeddings.weight for p in group["params"])
    )
    assert own["lr"] == 0.3
