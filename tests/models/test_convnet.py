from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gsdg import models as ours
from gsdg.types import ImageSpec
from gsdg.utils.errors import UserError

convnet = partial(ours.Classifier, backbone=ours.convnet)
SETTINGS = {"freeze_bn": False, "dropout": 0.0, "head": "linear", "image_size": 28, "mean": [0.0], "std": [1.0]}


def test_convnet_is_small_and_treats_every_image_alone():
    model = convnet(classes=10, weights=None, **SETTINGS)
    batch = torch.randn(3, 1, 28, 28)
    assert model.spec == ImageSpec(28, 1, (0.0,), (1.0,))
    assert sum(parameter.numel() for parameter in model.parameters()) == 93_770
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(batch)[:1], model(batch[:1]))


def test_convnet_takes_a_file_and_has_no_imagenet_weights(tmp_path):
    first = convnet(classes=10, weights=None, **SETTINGS)
    torch.save(first.featurizer.state_dict(), tmp_path / "digits.pth")
    second = convnet(classes=10, weights=str(tmp_path / "digits.pth"), **SETTINGS)
    batch = torch.randn(2, 1, 28, 28)
    assert torch.equal(first.featurize(batch), second.featurize(batch))
    with pytest.raises(UserError, match="no ImageNet weights"):
        convnet(classes=10, weights="imagenet", **SETTINGS)


def test_convnet_looks_at_as_many_channels_as_it_is_told(tmp_path):
    torch.manual_seed(0)
    featurizer, features = ours.convnet(None, channels=2)
    assert featurizer[0].weight.shape[:2] == (32, 2)
    batch = torch.rand(4, 2, 28, 28)
    assert featurizer(batch).shape == (4, features) == (4, 64)
    for channel in range(2):
        without = batch.clone()
        without[:, channel] = 0
        assert not torch.allclose(featurizer(without), featurizer(batch))
    featurizer, _ = ours.convnet(None)  # grey; its weights fit no other number of channels
    assert featurizer[0].weight.shape[1] == 1
    torch.save(featurizer.state_dict(), tmp_path / "grey.pth")
    with pytest.raises(UserError, match=r"0.weight \(32, 1, 3, 3\) instead of \(32, 2, 3, 3\)"):
        ours.convnet(str(tmp_path / "grey.pth"), channels=2)
    for channels in (0, 4, -1):
        with pytest.raises(UserError, match=rf"model\.backbone\.channels={channels}: .*Valid: 1, 2, 3"):
            ours.convnet(None, channels=channels)


def test_a_classifier_of_two_channels_learns_a_colour_and_asks_for_red_and_green():
    torch.manual_seed(0)
    backbone = partial(ours.convnet, channels=2)
    settings = SETTINGS | {"mean": [0.0, 0.0], "std": [1.0, 1.0]}
    model = ours.Classifier(backbone=backbone, classes=2, weights=None, **settings)
    assert model.spec == ImageSpec(28, 2, (0.0, 0.0), (1.0, 1.0))
    labels = torch.arange(16) % 2
    batch = torch.zeros(16, 2, 28, 28)
    batch[torch.arange(16), labels] = torch.rand(16, 28, 28)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        loss = cross_entropy(model(batch), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_the_mlp_is_one_hidden_layer_on_the_flattened_image():
    net, features = ours.mlp(None, inputs=12, width=5)
    images = torch.randn(7, 3, 2, 2)
    expected = (images.reshape(7, 12) @ net[1].weight.T + net[1].bias).clamp(min=0)
    torch.testing.assert_close(net(images), expected)
    assert features == 5
    with pytest.raises(UserError, match="found inputs=12 and width=0"):
        ours.mlp(None, inputs=12, width=0)


def test_the_mlp_starts_from_a_file(tmp_path):
    trained = ours.mlp(None, inputs=12, width=5)[0].state_dict()
    torch.save(trained, tmp_path / "mlp.pt")
    loaded = ours.mlp(str(tmp_path / "mlp.pt"), inputs=12, width=5)[0].state_dict()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
