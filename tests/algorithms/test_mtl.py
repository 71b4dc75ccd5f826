"""MTL against an explicit computation of the embeddings, image by image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import (
    CLASSES,
    FEATURES,
    assert_same,
    batches,
    classifier,
    gradients,
    gradients_of,
    ready,
    seed_all,
    unequal_batches,
)
from torch import Tensor

from gsdg.algorithms import MTL
from gsdg.models import Classifier
from gsdg.types import Batch


def mtl(*, ema=0.7, embedding="mean") -> MTL:
    return MTL(ema=ema, embedding=embedding)


def objective(model: Classifier, data: list[Batch], ema: float, old: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the embeddings after it."""
    losses, new = [], []
    for batch, before in zip(data, old, strict=True):
        features = [model.featurize(image[None])[0] for image in batch.images]
        embedding = ema * sum(features) / len(features) + (1 - ema) * before
        logits = torch.stack([model.head(torch.cat([row, embedding])) for row in features])
        losses.append(F.cross_entropy(logits, batch.labels))
        new.append(embedding.detach())
    return sum(losses) / len(losses), new


@pytest.mark.parametrize(("ema", "sizes"), [(0.7, (3, 6, 4)), (1.0, (4, 4, 4))])
def test_the_head_reads_the_moving_mean_of_the_domain_and_domains_count_equally(ema, sizes):
    algorithm, embeddings = ready(mtl(ema=ema)), [torch.zeros(FEATURES, dtype=torch.float64)] * 3
    optimizer = torch.optim.SGD(algorithm.parameter_groups(), lr=0.1)
    for step in range(3):
        data = [batch._replace(images=batch.images + 0.1 * step) for batch in unequal_batches(*sizes)]
        loss, new = objective(algorithm.model, data, ema, embeddings)
        metrics = algorithm.backward(data)
        torch.testing.assert_close(metrics["loss"], loss.detach())
        torch.testing.assert_close(algorithm.embeddings, torch.stack(new))
        algorithm.embeddings.copy_(torch.stack(embeddings))
        assert_same(gradients(algorithm, data), gradients_of(algorithm.model, loss))
        algorithm.step(optimizer)
        embeddings = new


def test_to_predict_the_embedding_is_the_mean_of_the_images_given():
    algorithm, (batch, *_) = ready(mtl()), batches(1, 6)
    algorithm.backward([batch] * 3)  # embeddings that must not be used
    algorithm.eval()
    before, model = algorithm.embeddings.clone(), algorithm.model
    features = torch.cat([model.featurize(image[None]) for image in batch.images])
    expected = model.head(torch.cat([features, features.mean(0).repeat(6, 1)], 1))
    torch.testing.assert_close(algorithm.predict(batch.images), expected)
    assert not torch.allclose(algorithm.predict(batch.images[:2]), expected[:2])
    assert torch.equal(algorithm.embeddings, before)


def test_noise_takes_the_place_of_the_embedding_as_in_domainbed():
    """One draw per image, domain by domain; no gradient flows through it."""
    data, algorithm = batches(), ready(mtl(embedding="noise"))
    actual = gradients(algorithm, data, seed=3)
    seed_all(3)
    losses = []
    for batch in data:
        noise = torch.empty(len(batch.labels), FEATURES, dtype=torch.float64).normal_()
        logits = algorithm.model.head(torch.cat([algorithm.model.featurize(batch.images), noise], 1))
        losses.append(F.cross_entropy(logits, batch.labels))
    assert_same(actual, gradients_of(algorithm.model, sum(losses) / 3))
    images = data[0].images
    assert not torch.equal(algorithm.predict(images), algorithm.predict(images))


def test_the_head_is_the_models_and_twice_as_wide():
    algorithm = ready(mtl(), dtype=torch.float32)
    assert algorithm.model.state_dict()["head.weight"].shape == (CLASSES, 2 * FEATURES)
    assert {p.dtype for p in algorithm.parameters()} == {torch.float32}
    trained = {id(p) for group in algorithm.parameter_groups() for p in group["params"]}
    assert id(algorithm.model.head.weight) in trained
    double = mtl()
    double.setup(classifier(), ["a", "b"])
    assert double.model.head.weight.dtype == double.embeddings.dtype == torch.float64
