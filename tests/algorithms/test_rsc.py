"""RSC against its equations, and its masks against quantiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, made, ready, risk
from torch import Tensor, nn

from gsdg.algorithms import RSC
from gsdg.algorithms.rsc import largest
from gsdg.batch import join
from gsdg.errors import UserError


def objective(model: nn.Module, data, feature_drop: float, batch_drop: float) -> tuple[Tensor, np.ndarray]:
    """The loss, image by image, and the mask [N, F] of what is left."""
    joint = join(data)
    features = model.featurize(joint.images)
    masks, lost = [], []
    for own, label in zip(features, joint.labels, strict=True):
        point = own.detach().requires_grad_()
        slopes = torch.autograd.grad(model.head(point)[label], point)[0].numpy()
        kept = torch.tensor(slopes < np.percentile(slopes, 100 * (1 - feature_drop)))
        before, after = model.head(point).softmax(0)[label], model.head(point * kept).softmax(0)[label]
        masks.append(kept)
        lost.append((before - after).item())
    challenged = np.array(lost) >= np.percentile(lost, 100 * (1 - batch_drop))
    left = [kept if hit else torch.ones_like(kept) for kept, hit in zip(masks, challenged, strict=True)]
    logits = [model.head(own * kept) for own, kept in zip(features, left, strict=True)]
    losses = [F.cross_entropy(z, y) for z, y in zip(logits, joint.labels, strict=True)]
    domains = torch.stack(losses).split(joint.sizes)
    return torch.stack([own.mean() for own in domains]).mean(), torch.stack(left).numpy()


@pytest.mark.parametrize(("feature_drop", "batch_drop"), [(1 / 3, 1 / 3), (0.5, 0.1), (0.1, 0.7)])
def test_it_mutes_the_strongest_features_where_that_costs_most(feature_drop, batch_drop):
    data, model = batches(images=5), classifier()
    loss, left = objective(model, data, feature_drop, batch_drop)
    assert 0 < (left.min(1) == 0).sum() < len(left)  # some images are left alone
    found = gradients(ready(RSC(feature_drop=feature_drop, batch_drop=batch_drop)), data)
    assert_same(found, gradients_of(model, loss))


def test_the_images_are_chosen_among_all_domains_and_minibatches_may_differ_in_size():
    data, model = [batches(images=size)[d] for d, size in enumerate((3, 7, 2))], classifier()
    loss, left = objective(model, data, 0.4, 0.25)
    hit = torch.tensor(left.min(1) == 0).split((3, 7, 2))
    assert len({own.double().mean().item() for own in hit}) > 1  # not the same share of each domain
    assert_same(gradients(ready(RSC(feature_drop=0.4, batch_drop=0.25)), data), gradients_of(model, loss))


@pytest.mark.parametrize("drops", [(0.0, 0.0), (0.0, 0.5), (0.5, 0.0)])
def test_a_share_of_0_is_erm(drops):
    data, model = batches(), classifier()
    found = gradients(ready(RSC(feature_drop=drops[0], batch_drop=drops[1])), data)
    assert_same(found, gradients_of(model, risk(model, join(data))), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("values", "share", "count"), [(64, 1 / 3, 22), (10, 1 / 3, 4), (9, 1 / 3, 3), (2048, 0.5, 1024)]
)
def test_how_many_are_the_largest_is_not_left_to_rounding(dtype, values, share, count):
    rows = torch.randn(5, values, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = largest(rows, share)
    assert found.sum(1).tolist() == [count] * 5
    assert (rows.masked_fill(~found, 9).amin(1) > rows.masked_fill(found, -9).amax(1)).all()


def test_ties_with_the_least_of_the_largest_are_among_them():
    assert largest(torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0]), 0.25).tolist() == [True, False, True, True, False]


@pytest.mark.parametrize("key", ["feature_drop", "batch_drop"])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_share_is_at_least_0_and_less_than_1(key, value):
    with pytest.raises(UserError, match=rf"algorithm\.{key}: found {value}, expected a number in \[0, 1\)"):
        RSC(**{"feature_drop": 0.3, "batch_drop": 0.3, key: value})


def test_a_model_without_a_head_is_refused():
    model = classifier()
    model.head = nn.Identity()
    with pytest.raises(UserError, match=r"model\.head=none has none: use model\.head=linear"):
        RSC(feature_drop=0.3, batch_drop=0.3).setup(model, ["a", "b"])


def test_its_defaults_are_domainbeds(compose):
    algorithm = made(compose, "rsc")
    assert (algorithm.feature_drop, algorithm.batch_drop) == (1 / 3, 1 / 3)
