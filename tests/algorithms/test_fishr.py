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
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gsdg.algorithms import ERM, Fishr
from gsdg.algorithms.fishr import variances
from gsdg.batch import Batch
from gsdg.errors import UserError
from gsdg.models import Classifier

HEAD = CLASSES * (FEATURES + 1)


def fishr(*, penalty_weight=30.0, anneal_steps=0, ema=0.9) -> Fishr:
    return Fishr(penalty_weight=penalty_weight, anneal_steps=anneal_steps, ema=ema)


def variance(model: Classifier, batch: Batch) -> Tensor:
    """[HEAD]: of the gradients of the single images in the head's weight and bias; a graph is kept."""
    head = list(model.head.parameters())
    found = []
    for image, label in zip(batch.images, batch.labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, head, create_graph=True)]))
    mean = sum(found) / len(found)
    return sum((g - mean) ** 2 for g in found) / len(found)


def objective(model: Classifier, data: list[Batch], weight: float, ema: float, history: list[list[Tensor]]) -> Tensor:
    """`history` has the variances of the steps before, one a domain, and gets this step's."""
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
    data, model = batches(), classifier()
    found = gradients(ready(fishr()), data)
    assert_same(found, gradients_of(model, objective(model, data, 30.0, 0.9, [])))


def test_domains_may_have_unequal_batches_and_lack_classes():
    data, model = [batches(3, images)[d] for d, images in enumerate((3, 6, 4))], classifier()
    data[1] = data[1]._replace(labels=torch.ones_like(data[1].labels))
    found = gradients(ready(fishr()), data)
    assert_same(found, gradients_of(model, objective(model, data, 30.0, 0.9, [])))


def test_the_mean_of_the_domains_losses_has_the_objectives_value_and_gradient():
    """So that they may go through gradient surgery; with unequal minibatches too."""
    data, model, algorithm = [batches(3, n)[d] for d, n in enumerate((3, 6, 4))], classifier(), ready(fishr())
    assert_losses_average_to(objective(model, data, 30.0, 0.9, []), algorithm, data, model)


@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_the_averages_follow_their_recurrence_and_only_the_last_term_has_a_gradient(ema):
    algorithm, history = ready(fishr(anneal_steps=2, ema=ema)), []
    optimizer = torch.optim.SGD(algorithm.parameter_groups(), lr=0.1)
    for step in range(5):
        data, weight = batches(seed=step), 0.0 if step < 2 else 30.0
        expected = gradients_of(algorithm.model, objective(algorithm.model, data, weight, ema, history))
        assert_same(gradients(algorithm, data), expected)
        algorithm.step(optimizer)


def test_while_it_waits_it_is_erm_and_at_the_end_the_optimizer_forgets():
    algorithm = ready(fishr(anneal_steps=2))
    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=0.0)
    ages = []
    for step in range(4):
        found, erm = gradients(algorithm, batches()), gradients(ready(ERM()), batches())
        if step < 2:
            assert_same(found, erm, rtol=1e-12, atol=1e-14)
        else:
            assert not torch.allclose(found["head.weight"], erm["head.weight"])
        algorithm.step(optimizer)
        ages.append(int(optimizer.state[algorithm.model.head.weight]["step"]))
    assert ages == [1, 2, 1, 2]


def test_without_a_penalty_it_is_erm():
    found, erm = gradients(ready(fishr(penalty_weight=0.0)), batches()), gradients(ready(ERM()), batches())
    assert_same(found, erm, rtol=1e-12, atol=1e-14)


def test_while_it_waits_no_penalty_however_large_reaches_the_loss():
    algorithm = ready(fishr(anneal_steps=1))
    algorithm.averages.fill_(torch.inf)
    metrics = algorithm.backward(batches())
    assert not metrics["penalty"].isfinite()
    torch.testing.assert_close(metrics["loss"], metrics["nll"])


def test_it_records_the_penalty_and_what_is_minimised():
    for anneal_steps, weight in ((0, 30.0), (1, 0.0)):
        metrics = ready(fishr(anneal_steps=anneal_steps)).backward(batches())
        assert metrics["penalty"] > 0
        torch.testing.assert_close(metrics["loss"], metrics["nll"] + weight * metrics["penalty"])


def test_the_averages_and_the_steps_are_in_the_checkpoint():
    first, second = ready(fishr(anneal_steps=3)), ready(fishr(anneal_steps=3))
    optimizer = torch.optim.SGD(first.parameter_groups(), lr=0.1)
    for step in range(4):
        gradients(first, batches(seed=step))
        first.step(optimizer)
    second.load_state_dict(first.state_dict())
    assert_same(gradients(second, batches()), gradients(first, batches()), rtol=0.0, atol=0.0)


def test_no_gradient_of_a_single_image_is_made():
    """No tensor [images, classes, features + 1] on the way."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            sizes.append(made.numel())
            return made

    with Watch():
        variances(torch.randn(50, CLASSES), torch.randn(50, FEATURES))
    assert max(sizes) == 50 * (FEATURES + 1)


def test_it_wants_a_linear_head():
    model = classifier()
    model.head = torch.nn.Identity()
    with pytest.raises(UserError, match=r"algorithm=fishr compares gradients of a linear head.*model\.head=linear"):
        fishr().setup(model, ["domain 0", "domain 1"])


@pytest.mark.parametrize(
    ("key", "value"), [("penalty_weight", -1.0), ("anneal_steps", -1), ("ema", 1.0), ("ema", -0.1)]
)
def test_bad_values_are_refused(key, value):
    with pytest.raises(UserError, match=rf"algorithm\.{key}: found {value}"):
        fishr(**{key: value})
