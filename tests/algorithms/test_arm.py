"""ARM against an explicit computation of its groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import (
    CHANNELS,
    CLASSES,
    FEATURES,
    SIZE,
    around,
    assert_same,
    backbone,
    batches,
    classifier,
    gradients,
    gradients_of,
    ready,
    refusal,
    unequal_batches,
)
from torch import Tensor, nn

from gsdg.algorithms import ARM
from gsdg.models import Classifier


def arm(*, support_size=4, train_context=True) -> ARM:
    return ARM(support_size=support_size, train_context=train_context)


def with_first_layers(net: nn.Module) -> Classifier:
    return around(lambda weights: (net, FEATURES))


def logits(model: Classifier, images: Tensor, contexts: Tensor, groups: list[list[int]]) -> dict[int, Tensor]:
    """Logits of a group's images, each with the mean of the group's contexts as an additional channel.

    Of an image in two groups, the later one counts.
    """
    rows = {}
    for group in groups:
        mean = sum(contexts[i] for i in group) / len(group)
        for i in group:
            rows[i] = model.head(model.featurizer(torch.cat([images[i], mean])[None]))[0]
    return rows


@pytest.mark.parametrize(
    ("support_size", "sizes", "groups"),
    [
        (4, (4, 4, 4), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),  # one per domain
        (2, (4, 4, 4), [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]),
        (9, (4, 4, 4), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),  # never of two domains
        (3, (3, 6, 4), [[10, 11, 12], [0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]),  # the last image: with 10, 11
    ],
)
def test_a_context_is_the_mean_over_its_group_and_domains_count_equally(support_size, sizes, groups):
    data, algorithm = unequal_batches(*sizes), ready(arm(support_size=support_size))
    model, images = algorithm.model, torch.cat([batch.images for batch in data])
    rows = logits(model, images, model.context(images), groups)
    domains = torch.stack([rows[i] for i in range(len(images))]).split(sizes)
    losses = [F.cross_entropy(row, batch.labels) for row, batch in zip(domains, data, strict=True)]
    assert_same(gradients(algorithm, data), gradients_of(model, sum(losses) / 3))


@pytest.mark.parametrize(
    ("support_size", "images", "groups"),
    [(3, 8, [[5, 6, 7], [0, 1, 2], [3, 4, 5]]), (30, 5, [[0, 1, 2, 3, 4]])],
    ids=["the images left over share the mean of the last support_size", "fewer images are one group"],
)
def test_the_groups_of_a_prediction(support_size, images, groups):
    algorithm, (batch, *_) = ready(arm(support_size=support_size)).eval(), batches(1, images)
    expected = logits(algorithm.model, batch.images, algorithm.model.context(batch.images), groups)
    torch.testing.assert_close(algorithm.predict(batch.images), torch.stack([expected[i] for i in range(images)]))


def test_the_context_network_is_the_models_and_is_trained_if_it_should():
    for train_context in (True, False):
        algorithm = ready(arm(train_context=train_context))
        names = {name for name in algorithm.model.state_dict() if name.startswith("context.")}
        assert {"context.0.weight", "context.1.running_mean", "context.6.bias"} <= names
        assert algorithm.model.context[3].weight.shape == (64, 64, 5, 5)
        with_gradient = {name for name in gradients(algorithm, batches()) if name.startswith("context.")}
        assert {f"context.{k}.weight" for k in (0, 1, 3, 4, 6) if train_context} <= with_gradient
        assert train_context or not with_gradient
        trained = {id(p) for group in algorithm.parameter_groups() for p in group["params"]}
        assert {id(p) in trained for p in algorithm.model.context.parameters()} == {train_context}


def test_the_first_convolution_is_widened_by_its_first_channel_and_stays_frozen_if_it_is():
    for trained in (True, False):
        plain, model = classifier().featurizer[0], classifier()
        model.featurizer[0].weight.requires_grad_(trained)
        arm().setup(model, ["domain 0"])
        wide = model.featurizer[0]
        assert (wide.in_channels, wide.weight.shape[1]) == (CHANNELS + 1, CHANNELS + 1)
        assert torch.equal(wide.weight[:, :CHANNELS], plain.weight)
        assert torch.equal(wide.bias, plain.bias)
        assert torch.equal(wide.weight[:, CHANNELS], plain.weight[:, 0])
        assert wide.weight.requires_grad == trained


def test_a_linear_first_layer_takes_the_channel_last():
    net = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * SIZE * SIZE, FEATURES)).double()
    weight = net[1].weight.detach().clone().unflatten(1, (CHANNELS, SIZE, SIZE))
    algorithm = arm()
    algorithm.setup(with_first_layers(net).double(), ["domain 0"])
    wide = net[1].weight.unflatten(1, (CHANNELS + 1, SIZE, SIZE))
    assert torch.equal(wide[:, :CHANNELS], weight)
    assert torch.equal(wide[:, CHANNELS], weight[:, 0])
    assert algorithm.predict(batches()[0].images).shape == (4, CLASSES)


def test_the_new_weights_have_the_memory_format_of_the_others():
    images = batches()[0].images
    expected = ready(arm()).predict(images)
    for layout in (torch.channels_last, torch.contiguous_format):
        algorithm = arm()
        algorithm.setup(classifier().to(memory_format=layout), ["domain 0"])
        for weight in (algorithm.model.featurizer[0].weight, algorithm.model.context[0].weight):
            assert weight.is_contiguous(memory_format=layout)
        torch.testing.assert_close(algorithm.predict(images.to(memory_format=layout)), expected)


def test_bfloat16_reaches_both_networks():
    algorithm, model, seen = arm(), around(backbone), {}
    model.precision = "bf16"
    algorithm.setup(model, ["domain 0"])
    for name, module in {"context": model.context, "first": model.featurizer[0]}.items():
        module.register_forward_hook(lambda module, given, out, name=name: seen.update({name: (given[0], out)}))
    predicted = algorithm.predict(batches(dtype=torch.float32)[0].images)
    assert {out.dtype for _, out in seen.values()} == {torch.bfloat16}
    assert predicted.dtype == torch.float32
    mean = seen["context"][1].float().mean(0)  # in float32
    assert torch.equal(seen["first"][0][:, CHANNELS:], mean.expand(4, 1, SIZE, SIZE))


def test_other_first_layers_are_refused():
    for net in (nn.Sequential(nn.Flatten(), nn.Linear(7, 6)), nn.Conv2d(CHANNELS, 6, 3, groups=3), nn.Flatten()):
        message = refusal(arm().setup, with_first_layers(net), ["domain 0"])
        assert "algorithm=arm gives the model one more input channel, but its first layer is" in message
