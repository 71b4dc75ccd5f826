"""ARM against its groups, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import (
    CHANNELS,
    CLASSES,
    SIZE,
    assert_same,
    backbone,
    batches,
    classifier,
    gradients,
    gradients_of,
    ready,
)
from torch import Tensor, nn

from gsdg.algorithms import ARM
from gsdg.errors import UserError
from gsdg.models import Classifier


def arm(*, support_size=4, train_context=True) -> ARM:
    return ARM(support_size=support_size, train_context=train_context)


def around(net: nn.Module, features: int) -> Classifier:
    options = {"dropout": 0.0, "freeze_bn": False, "image_size": SIZE, "mean": [0.0] * 3, "std": [1.0] * 3}
    return Classifier(backbone=lambda _: (net, features), weights=None, classes=CLASSES, head="linear", **options)


def logits(model: Classifier, images: Tensor, contexts: Tensor, groups: list[list[int]]) -> dict[int, Tensor]:
    """image -> logits: a group's images beside the mean of the group's contexts."""
    found = {}
    for group in groups:
        mean = sum(contexts[i] for i in group) / len(group)
        for i in group:
            found[i] = model.head(model.featurizer(torch.cat([images[i], mean])[None]))[0]
    return found


@pytest.mark.parametrize(
    ("size", "groups"),
    [
        (4, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),  # a domain each
        (2, [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]),
        (9, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),  # never over two domains
    ],
)
def test_a_context_is_the_mean_over_its_group(size, groups):
    data, algorithm = batches(), ready(arm(support_size=size))
    model, images = algorithm.model, torch.cat([batch.images for batch in data])
    found = logits(model, images, model.context(images), groups)
    losses = [F.cross_entropy(torch.stack([found[4 * d + i] for i in range(4)]), data[d].labels) for d in range(3)]
    assert_same(gradients(algorithm, data), gradients_of(model, sum(losses) / 3))


def test_images_left_over_share_the_mean_of_the_last_support_size():
    algorithm, (batch, *_) = ready(arm(support_size=3)), batches(1, 8)
    algorithm.eval()
    model = algorithm.model
    contexts = model.context(batch.images)
    expected = logits(model, batch.images, contexts, [[0, 1, 2], [3, 4, 5]])
    expected |= {i: one for i, one in logits(model, batch.images, contexts, [[5, 6, 7]]).items() if i > 5}
    torch.testing.assert_close(algorithm.predict(batch.images), torch.stack([expected[i] for i in range(8)]))


def test_fewer_images_than_the_support_size_are_one_group():
    algorithm, (batch, *_) = ready(arm(support_size=30)), batches(1, 5)
    algorithm.eval()
    expected = logits(algorithm.model, batch.images, algorithm.model.context(batch.images), [[0, 1, 2, 3, 4]])
    torch.testing.assert_close(algorithm.predict(batch.images), torch.stack([expected[i] for i in range(5)]))


def test_the_domains_of_unequal_batches_are_grouped_apart_and_count_alike():
    algorithm = ready(arm(support_size=3))
    data = [batches(3, images)[d] for d, images in enumerate((3, 6, 4))]
    model, images = algorithm.model, torch.cat([batch.images for batch in data])
    contexts = model.context(images)
    found = logits(model, images, contexts, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]])
    found[12] = logits(model, images, contexts, [[10, 11, 12]])[12]
    rows = torch.stack([found[i] for i in range(13)]).split((3, 6, 4))
    losses = [F.cross_entropy(own, batch.labels) for own, batch in zip(rows, data, strict=True)]
    assert_same(gradients(algorithm, data), gradients_of(model, sum(losses) / 3))


def test_the_context_network_is_the_models_and_trained():
    algorithm = ready(arm())
    names = {name for name in algorithm.model.state_dict() if name.startswith("context.")}
    assert {"context.0.weight", "context.1.running_mean", "context.6.bias"} <= names
    assert algorithm.model.context[3].weight.shape == (64, 64, 5, 5)
    assert {f"context.{k}.weight" for k in (0, 1, 3, 4, 6)} <= set(gradients(algorithm, batches()))
    trained = {id(p) for group in algorithm.parameter_groups() for p in group["params"]}
    assert {id(p) for p in algorithm.model.context.parameters()} <= trained


def test_an_untrained_context_stays_as_it_was_made():
    algorithm = ready(arm(train_context=False))
    assert not any(name.startswith("context.") for name in gradients(algorithm, batches()))
    trained = {id(p) for group in algorithm.parameter_groups() for p in group["params"]}
    assert not trained & {id(p) for p in algorithm.model.context.parameters()}


def test_the_first_convolution_is_widened_by_its_first_channel():
    plain, wide = classifier().featurizer[0], ready(arm()).model.featurizer[0]
    assert (wide.in_channels, wide.weight.shape[1]) == (CHANNELS + 1, CHANNELS + 1)
    assert torch.equal(wide.weight[:, :CHANNELS], plain.weight)
    assert torch.equal(wide.bias, plain.bias)
    assert torch.equal(wide.weight[:, CHANNELS], plain.weight[:, 0])


def test_a_linear_first_layer_takes_the_channel_last():
    net = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * SIZE * SIZE, 6)).double()
    weight = net[1].weight.detach().clone().unflatten(1, (CHANNELS, SIZE, SIZE))
    algorithm = arm()
    algorithm.setup(around(net, 6).double(), ["domain 0"])
    wide = net[1].weight.unflatten(1, (CHANNELS + 1, SIZE, SIZE))
    assert torch.equal(wide[:, :CHANNELS], weight)
    assert torch.equal(wide[:, CHANNELS], weight[:, 0])
    assert algorithm.predict(batches()[0].images).shape == (4, CLASSES)


def test_a_frozen_first_layer_stays_frozen():
    model = classifier()
    model.featurizer[0].weight.requires_grad_(False)
    arm().setup(model, ["domain 0"])
    assert not model.featurizer[0].weight.requires_grad


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_new_weights_lie_as_the_others(layout):
    algorithm = arm()
    algorithm.setup(classifier().to(memory_format=layout), ["domain 0"])
    for weight in (algorithm.model.featurizer[0].weight, algorithm.model.context[0].weight):
        assert weight.is_contiguous(memory_format=layout)
    images = batches()[0].images
    expected = ready(arm()).predict(images)
    torch.testing.assert_close(algorithm.predict(images.to(memory_format=layout)), expected)


def test_bfloat16_reaches_both_networks():
    algorithm = arm()
    net, features = backbone(None)
    model = around(net, features)
    model.precision = "bf16"
    algorithm.setup(model, ["domain 0"])
    seen = {}
    for name, module in {"context": model.context, "first": model.featurizer[0]}.items():
        module.register_forward_hook(lambda module, given, out, name=name: seen.update({name: (given[0], out)}))
    found = algorithm.predict(batches(dtype=torch.float32)[0].images)
    assert {out.dtype for _, out in seen.values()} == {torch.bfloat16}
    assert found.dtype == torch.float32
    mean = seen["context"][1].float().mean(0)  # in float32
    assert torch.equal(seen["first"][0][:, CHANNELS:], mean.expand(4, 1, SIZE, SIZE))


@pytest.mark.parametrize(
    "net", [nn.Sequential(nn.Flatten(), nn.Linear(7, 6)), nn.Conv2d(CHANNELS, 6, 3, groups=3), nn.Flatten()]
)
def test_other_first_layers_are_refused(net):
    with pytest.raises(UserError, match="algorithm=arm gives the model one channel more, but its first layer is"):
        arm().setup(around(net, 6), ["domain 0"])


def test_the_state_goes_on_in_a_fresh_object():
    first, second = ready(arm()), ready(arm())
    optimizer = torch.optim.SGD(first.parameter_groups(), lr=0.1)
    for step in range(3):
        gradients(first, batches(seed=step))
        first.step(optimizer)
    second.load_state_dict(first.state_dict())
    assert_same(gradients(second, batches()), gradients(first, batches()), rtol=0.0, atol=0.0)


def test_bad_values_are_refused():
    with pytest.raises(UserError, match=r"algorithm\.support_size: found 0, expected"):
        arm(support_size=0)
