"""Fishr against per-image gradients, one `autograd.grad` each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import (
    CLASSES,
    FEATURES,
    assert_losses_average_to,
    assert_same,
    batches,
    classifier,
    gradients,
    gradients_of,
    ready,
    unequal_batches,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gsdg.algorithms import Fishr
from gsdg.algorithms.fishr import gradient_variances
from gsdg.models import Classifier
from gsdg.types import Batch

HEAD = CLASSES * (FEATURES + 1)


def fishr(*, penalty_weight=30.0, anneal_steps=0, ema=0.9) -> Fishr:
    return Fishr(penalty_weight=penalty_weight, anneal_steps=anneal_steps, ema=ema)


def variance(model: Classifier, batch: Batch) -> Tensor:
    """Variances [HEAD] of the per-image gradients of the head's weight and bias, with a graph."""
    head, rows = list(model.head.parameters()), []
    for image, label in zip(batch.images, batch.labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, head, create_graph=True)]))
    mean = sum(rows) / len(rows)
    return sum((g - mean) ** 2 for g in rows) / len(rows)


def objective(model: Classifier, data: list[Batch], weight: float, ema: float, history: list[list[Tensor]]) -> Tensor:
    """`history` has the variances of the earlier steps, one per domain; this step's are added to it."""
    history.append([variance(model, batch) for batch in data])
    averages = []
    for d in range(len(data)):
        average = torch.zeros(HEAD, dtype=torch.float64)
        for step, now in enumerate(history):
            new = now[d] if step == len(history) - 1 else now[d].detach()
            average = ema * average + (1 - ema) * new
        averages.append(average / (1 - ema))
    mean = sum(averages) / len(averages)
    penalty = sum(((average - mean) ** 2).mean() for average in averages) / len(averages)
    images, labels = torch.cat([b.images for b in data]), torch.cat([b.labels for b in data])
    return F.cross_entropy(model(images), labels) + weight * penalty


def test_the_penalty_compares_the_variances_of_the_images_gradients():
    """Minibatches may be unequal and lack classes."""
    unequal = unequal_batches(3, 6, 4)
    unequal[1] = unequal[1]._replace(labels=torch.ones_like(unequal[1].labels))
    for data in (batches(), unequal):
        model = classifier()
        assert_same(gradients(ready(fishr()), data), gradients_of(model, objective(model, data, 30.0, 0.9, [])))


def test_the_mean_of_the_domains_losses_has_the_objectives_value_and_gradient():
    data, model = unequal_batches(3, 6, 4), classifier()
    assert_losses_average_to(objective(model, data, 30.0, 0.9, []), ready(fishr()), data, model)


@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_the_averages_follow_their_recurrence_and_only_the_last_term_has_a_gradient(ema):
    """Before the annealing ends there is no penalty; at its end the optimizer is reset."""
    algorithm, history, steps_of_adam = ready(fishr(anneal_steps=2, ema=ema)), [], []
    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=0.01)
    for step in range(5):
        data, weight = batches(seed=step), 0.0 if step < 2 else 30.0
        expected = gradients_of(algorithm.model, objective(algorithm.model, data, weight, ema, history))
        assert_same(gradients(algorithm, data), expected)
        algorithm.step(optimizer)
        steps_of_adam.append(int(optimizer.state[algorithm.model.head.weight]["step"]))
    assert steps_of_adam == [1, 2, 1, 2, 3]


def test_before_the_annealing_ends_no_penalty_however_large_reaches_the_loss():
    algorithm = ready(fishr(anneal_steps=1))
    algorithm.averages.fill_(torch.inf)
    metrics = algorithm.backward(batches())
    assert not metrics["penalty"].isfinite()
    torch.testing.assert_close(metrics["loss"], metrics["nll"])


def test_it_records_the_penalty_and_the_loss():
    for anneal_steps, weight in ((0, 30.0), (1, 0.0)):
        metrics = ready(fishr(anneal_steps=anneal_steps)).backward(batches())
        assert metrics["penalty"] > 0
        torch.testing.assert_close(metrics["loss"], metrics["nll"] + weight * metrics["penalty"])


def test_no_gradient_of_a_single_image_is_made():
    """No tensor [images, classes, features + 1] is created."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            sizes.append(made.numel())
            return made

    with Watch():
        gradient_variances(torch.randn(50, CLASSES), torch.randn(50, FEATURES))
    assert max(sizes) == 50 * (FEATURES + 1)
