"""MixStyle against loops over images and channels; it does not change the model outside of training steps."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import (
    CHANNELS,
    SIZE,
    around,
    assert_same,
    batches,
    classifier,
    gradients,
    gradients_of,
    made,
    ready,
    refusal,
    seed_all,
)
from torch import Tensor, nn

from gsdg import models
from gsdg.algorithms import MixStyle
from gsdg.algorithms.mixstyle import cross_domain_partners, mix_statistics
from gsdg.models import Classifier, convnet, resnet18
from gsdg.types import join

OPTIONS = {"p": 0.5, "alpha": 0.1, "mix": "random", "after": None}


def mixstyle(**changes) -> MixStyle:
    return MixStyle(**OPTIONS | changes)


def restyled(maps: Tensor, partners, shares) -> Tensor:
    """One image and one channel after the other; a map's mean and standard deviation are numbers."""
    rows = []
    for image, j, share in zip(maps, partners, shares, strict=True):
        channels = []
        for channel, other in zip(image, maps[j], strict=True):
            m, m2 = (pixels.detach().numpy().mean() for pixels in (channel, other))
            s, s2 = (math.sqrt(pixels.detach().numpy().var(ddof=1) + 1e-6) for pixels in (channel, other))
            channels.append((share * s + (1 - share) * s2) * (channel - m) / s + share * m + (1 - share) * m2)
        rows.append(torch.stack(channels))
    return torch.stack(rows)


def objective(model: Classifier, data, places: list[str], p: float, alpha: float, partners) -> Tensor:
    """The mean of the domains' cross-entropies, with the draws made as they are due; `partners(images)` draws too."""
    joint = join(data)
    maps = joint.images
    for name, module in model.featurizer.named_children():
        maps = module(maps)
        if name in places and np.random.random() < p:
            chosen = partners(len(maps))
            maps = restyled(maps, chosen, np.random.beta(alpha, alpha, size=len(maps)))
    logits = joint.split(model.head(maps))
    labels = joint.split(joint.labels)
    return torch.stack([F.cross_entropy(z, y) for z, y in zip(logits, labels, strict=True)]).mean()


@pytest.mark.parametrize("places", [["2"], ["2", "5"], ["0"]])
@pytest.mark.parametrize("p", [1.0, 0.5])
def test_maps_get_statistics_between_their_own_and_anothers(places, p):
    data, model = batches(), classifier()
    algorithm = ready(mixstyle(p=p, alpha=0.7, after=places))
    losses = set()
    for seed in range(3):
        actual = gradients(algorithm, data, seed=seed)
        seed_all(seed)
        loss = objective(model, data, places, p, 0.7, np.random.permutation)
        assert_same(actual, gradients_of(model, loss))
        losses.add(loss.item())
    assert len(losses) > 1


def test_crossdomain_partners_are_of_the_next_domain_in_a_circle():
    for sizes in [(4, 4), (4, 4, 4), (3, 5, 2), (1, 6)]:
        domains, circles = np.repeat(np.arange(len(sizes)), sizes), set()
        for seed in range(20):
            np.random.seed(seed)
            partners = cross_domain_partners(sizes)
            nexts = [set(domains[partners[domains == d]]) for d in range(len(sizes))]
            assert all(len(other) == 1 for other in nexts), sizes  # all images of a domain meet the same one
            assert sorted(other for (other,) in nexts) == list(range(len(sizes)))
            assert all({d} != other for d, other in enumerate(nexts)), sizes
            for d, (other,) in enumerate(nexts):
                assert len(set(partners[domains == d])) == min(sizes[d], sizes[other])
            circles.add(tuple(other for (other,) in nexts))
        assert len(circles) == {2: 1, 3: 2}[len(sizes)]


def test_crossdomain_mixes_with_those_partners():
    data, model = batches(), classifier()
    actual = gradients(ready(mixstyle(p=1.0, mix="crossdomain", alpha=1.0)), data)
    seed_all()
    loss = objective(model, data, ["2"], 1.0, 1.0, lambda images: cross_domain_partners((4, 4, 4)))
    assert_same(actual, gradients_of(model, loss))


def test_each_place_has_its_own_coin(monkeypatch):
    data, algorithm, calls = batches(images=1), ready(mixstyle(p=0.3, after=["2", "5"])), []
    monkeypatch.setattr("gsdg.algorithms.mixstyle.mix_statistics", lambda maps, *_: calls.append(maps.shape[1]) or maps)
    seed_all()
    seen = {(): 0, (4,): 0, (6,): 0, (4, 6): 0}  # channels of the maps mixed in a step
    for _ in range(200):
        calls.clear()
        algorithm.losses(data)
        seen[tuple(calls)] += 1
    shares = np.array(list(seen.values())) / 200
    assert np.allclose(shares, [0.49, 0.21, 0.21, 0.09], atol=0.07)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_outside_of_a_training_step_the_model_is_unchanged(monkeypatch):
    data, algorithm, plain = batches(), ready(mixstyle(p=1.0)), classifier().eval()
    assert algorithm.model.training
    algorithm.backward(data)
    twin = copy.deepcopy(algorithm.model).eval()
    algorithm.eval()
    joint = join(data).images
    for model in (algorithm.model, twin):
        assert hooks(model) == 0
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert torch.equal(model(joint), plain(joint))
    monkeypatch.setattr("gsdg.algorithms.mixstyle.mix_statistics", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        algorithm.backward(data)
    assert hooks(algorithm.model) == 0


def test_bfloat16_maps_are_mixed_in_float32_and_stay_channels_last():
    maps = 100 + torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    maps = maps.bfloat16().contiguous(memory_format=torch.channels_last)
    partners, shares = torch.arange(6).roll(1), torch.linspace(0, 1, 6, dtype=torch.float64)
    mixed = mix_statistics(maps, partners, shares)
    assert mixed.dtype == torch.bfloat16
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    expected = restyled(maps.double(), partners, shares.numpy())
    torch.testing.assert_close(mixed.double(), expected, rtol=2**-8, atol=0)  # one rounding
    assert torch.equal(mixed[5], maps[5])  # its share is 1


@pytest.mark.parametrize(
    ("backbone", "channels", "places"),
    [(convnet, 1, ["2", "5", "8"]), (resnet18, 3, ["layer1", "layer2", "layer3"])],
)
def test_null_means_all_stages_but_the_last(backbone, channels, places):
    model = around(backbone, channels, 32)
    before = copy.deepcopy(model.state_dict())
    algorithm = made("mixstyle")
    algorithm.setup(model, ["a", "b"])
    assert algorithm.mixed_modules == places
    assert model.training
    assert hooks(model) == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # BatchNorm's too


@pytest.mark.slow
def test_null_means_the_stages_of_timms_networks():
    pytest.importorskip("timm")
    for backbone, places in [
        (models.efficientnet_lite0, ["blocks.1", "blocks.2", "blocks.4"]),
        (models.resnet50_augmix, ["layer1", "layer2", "layer3"]),
    ]:
        algorithm = mixstyle()
        algorithm.setup(around(backbone, 3, 64), ["a", "b"])
        assert algorithm.mixed_modules == places


def test_places_are_names_or_numbers_and_those_without_maps_are_refused_with_those_that_have_them():
    assert ready(made("mixstyle", "algorithm.after=[2,5]")).mixed_modules == ["2", "5"]
    for after in (["nowhere"], ["2", "6"], []):  # 6 pools all places into one
        message = refusal(ready, mixstyle(after=after))
        assert re.search(r"algorithm\.after: found .* Valid: .* such as 0, 1, 2, 3, 4, 5\.", message), after
        assert all(name in message for name in after if name != "2")


def test_a_network_with_maps_but_no_known_stages_needs_names_and_one_without_maps_is_refused():
    flat = [nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()]  # [B, 4, 36]: no longer a map
    with_maps = around(lambda weights: (nn.Sequential(nn.Conv2d(CHANNELS, 4, 3), *flat), 4))
    message = refusal(mixstyle().setup, with_maps, ["a", "b"])
    assert re.search(r"algorithm\.after: null means .* such as 0\.", message)
    layers = [nn.Flatten(), nn.Linear(CHANNELS * SIZE * SIZE, 6), nn.ReLU()]
    without_maps = around(lambda weights: (nn.Sequential(*layers), 6))
    assert "changes feature maps, and the model has none" in refusal(mixstyle().setup, without_maps, ["a", "b"])


def test_crossdomain_needs_two_domains():
    assert [mixstyle(mix=mix).min_domains for mix in ("random", "crossdomain")] == [1, 2]
