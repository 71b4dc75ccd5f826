from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gsdg import models as ours
from gsdg.batch import ImageSpec
from gsdg.errors import UserError

convnet = partial(ours.Classifier, backbone=ours.convnet)
SETTINGS = {"freeze_bn": False, "dropout": 0.0, "head": "linear", "image_size": 28, "mean": [0.0], "std": [1.0]}


def loss_after(steps: int, model: nn.Module, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(batch), labels)
        loss.backward()
        optimizer.step()
    return loss


def test_convnet_is_small_and_treats_every_image_alone():
    model = convnet(classes=10, weights=None, **SETTINGS)
    batch = torch.randn(3, 1, 28, 28)
    assert model.spec == ImageSpec(28, 1, (0.0,), (1.0,))
    assert sum(parameter.numel() for parameter in model.parameters()) == 93_770
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(batch)[:1], model(batch[:1]))


def test_convnet_learns_where_a_bright_bar_stands():
    torch.manual_seed(0)
    model = convnet(classes=4, weights=None, **SETTINGS)
    labels = torch.arange(32) % 4
    batch = 0.1 * torch.randn(32, 1, 28, 28)
    for image, label in zip(batch, labels.tolist(), strict=True):  # vertical or horizontal, thin or thick
        bar = slice(10, 12 if label < 2 else 18)
        image[0][(bar, slice(None)) if label % 2 else (slice(None), bar)] += 1
    assert loss_after(30, model, batch, labels) < 0.1


def test_convnet_takes_a_file_and_has_no_imagenet_weights(tmp_path):
    first = convnet(classes=10, weights=None, **SETTINGS)
    torch.save(first.featurizer.state_dict(), tmp_path / "digits.pth")
    second = convnet(classes=10, weights=str(tmp_path / "digits.pth"), **SETTINGS)
    batch = torch.randn(2, 1, 28, 28)
    assert torch.equal(first.featurize(batch), second.featurize(batch))
    with pytest.raises(UserError, match="no ImageNet weights"):
        convnet(classes=10, weights="imagenet", **SETTINGS)


def test_convnet_looks_at_as_many_channels_as_it_is_told():
    torch.manual_seed(0)
    featurizer, features = ours.convnet(None, channels=2)
    assert featurizer[0].weight.shape[:2] == (32, 2)
    batch = torch.rand(4, 2, 28, 28)
    assert featurizer(batch).shape == (4, features) == (4, 64)
    for channel in range(2):
        without = batch.clone()
        without[:, channel] = 0
        assert not torch.allclose(featurizer(without), featurizer(batch))


def test_convnet_without_a_number_of_channels_is_grey_and_its_weights_fit_no_other(tmp_path):
    featurizer, _ = ours.convnet(None)
    assert featurizer[0].weight.shape[1] == 1
    torch.save(featurizer.state_dict(), tmp_path / "grey.pth")
    with pytest.raises(UserError, match=r"0.weight \(32, 1, 3, 3\) instead of \(32, 2, 3, 3\)"):
        ours.convnet(str(tmp_path / "grey.pth"), channels=2)


@pytest.mark.parametrize("channels", [0, 4, -1])
def test_convnet_refuses_other_channels(channels):
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
    assert loss_after(20, model, batch, labels) < 0.1
