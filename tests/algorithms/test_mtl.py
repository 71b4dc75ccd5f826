"""MTL against embeddings written out, image by image."""

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
)
from torch import Tensor, nn

from gsdg.algorithms import ERM, MTL
from gsdg.batch import Batch
from gsdg.errors import UserError
from gsdg.models import Classifier


def mtl(*, ema=0.7, embedding="mean") -> MTL:
    return MTL(ema=ema, embedding=embedding)


def objective(model: Classifier, data: list[Batch], ema: float, old: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the embeddings that it leaves."""
    losses, new = [], []
    for batch, before in zip(data, old, strict=True):
        features = [model.featurize(image[None])[0] for image in batch.images]
        embedding = ema * sum(features) / len(features) + (1 - ema) * before
        logits = torch.stack([model.head(torch.cat([own, embedding])) for own in features])
        losses.append(F.cross_entropy(logits, batch.labels))
        new.append(embedding.detach())
    return sum(losses) / len(losses), new


@pytest.mark.parametrize("ema", [0.7, 1.0])
def test_the_head_reads_the_moving_mean_of_the_domain(ema):
    algorithm, embeddings = ready(mtl(ema=ema)), [torch.zeros(FEATURES, dtype=torch.float64)] * 3
    optimizer = torch.optim.SGD(algorithm.parameter_groups(), lr=0.1)
    for step in range(3):
        data = batches(seed=step)
        loss, embeddings = objective(algorithm.model, data, ema, embeddings)
        assert_same(gradients(algorithm, data), gradients_of(algorithm.model, loss))
        torch.testing.assert_close(algorithm.embeddings, torch.stack(embeddings))
        algorithm.step(optimizer)


def test_domains_of_unequal_batches_count_alike():
    algorithm, zeros = ready(mtl()), [torch.zeros(FEATURES, dtype=torch.float64)] * 3
    data = [batches(3, images)[d] for d, images in enumerate((3, 6, 4))]
    loss, _ = objective(algorithm.model, data, 0.7, zeros)
    metrics = algorithm.backward(data)
    torch.testing.assert_close(metrics["loss"], loss.detach())
    algorithm.embeddings.zero_()
    assert_same(gradients(algorithm, data), gradients_of(algorithm.model, loss))


def test_a_head_that_does_not_look_at_the_embedding_is_erms():
    algorithm, erm = ready(mtl()), ready(ERM())
    with torch.no_grad():
        algorithm.model.head.weight[:, FEATURES:] = 0
        erm.model.head.weight.copy_(algorithm.model.head.weight[:, :FEATURES])
        erm.model.head.bias.copy_(algorithm.model.head.bias)
    found, expected = gradients(algorithm, batches()), gradients(erm, batches())
    found["head.weight"] = found["head.weight"][:, :FEATURES]
    assert_same(found, expected, rtol=1e-12, atol=1e-14)


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
    """One draw an image, domain by domain; no gradient goes through it."""
    data, algorithm = batches(), ready(mtl(embedding="noise"))
    found = gradients(algorithm, data, seed=3)
    seed_all(3)
    losses = []
    for batch in data:
        noise = torch.empty(len(batch.labels), FEATURES, dtype=torch.float64).normal_()
        logits = algorithm.model.head(torch.cat([algorithm.model.featurize(batch.images), noise], 1))
        losses.append(F.cross_entropy(logits, batch.labels))
    assert_same(found, gradients_of(algorithm.model, sum(losses) / 3))
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


def test_the_embeddings_are_in_the_checkpoint():
    first, second = ready(mtl()), ready(mtl())
    for step in range(3):
        gradients(first, batches(seed=step))
    assert first.embeddings.shape == (3, FEATURES)
    second.load_state_dict(first.state_dict())
    assert_same(gradients(second, batches()), gradients(first, batches()), rtol=0.0, atol=0.0)


def test_it_wants_a_linear_head():
    model = classifier()
    model.head = nn.Identity()
    with pytest.raises(UserError, match=r"algorithm=mtl gives a linear head .*model\.head=linear"):
        mtl().setup(model, ["domain 0"])


@pytest.mark.parametrize(("key", "value"), [("ema", 0.0), ("ema", 1.1), ("embedding", "median")])
def test_bad_values_are_refused(key, value):
    with pytest.raises(UserError, match=rf"algorithm\.{key}.*{value}.*"):
        mtl(**{key: value})
