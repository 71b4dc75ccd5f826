"""RSC against its equations, and its masks against quantiles."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from algorithm_cases import assert_same, batches, classifier, gradients, gradients_of, made, ready, unequal_batches
from torch import Tensor, nn

from gsdg.algorithms import RSC
from gsdg.algorithms.rsc import largest
from gsdg.types import join


def objective(model: nn.Module, data, feature_drop: float, batch_drop: float) -> tuple[Tensor, np.ndarray]:
    """The loss, image by image, and the mask [N, F] of the features that are kept."""
    joint = join(data)
    features = model.featurize(joint.images)
    masks, lost = [], []
    for row, label in zip(features, joint.labels, strict=True):
        point = row.detach().requires_grad_()
        slopes = torch.autograd.grad(model.head(point)[label], point)[0].numpy()
        kept = torch.tensor(slopes < np.percentile(slopes, 100 * (1 - feature_drop)))
        before, after = model.head(point).softmax(0)[label], model.head(point * kept).softmax(0)[label]
        masks.append(kept)
        lost.append((before - after).item())
    challenged = np.array(lost) >= np.percentile(lost, 100 * (1 - batch_drop))
    left = [kept if hit else torch.ones_like(kept) for kept, hit in zip(masks, challenged, strict=True)]
    logits = [model.head(row * kept) for row, kept in zip(features, left, strict=True)]
    losses = [F.cross_entropy(z, y) for z, y in zip(logits, joint.labels, strict=True)]
    domains = torch.stack(losses).split(joint.sizes)
    return torch.stack([domain.mean() for domain in domains]).mean(), torch.stack(left).numpy()


def test_it_mutes_the_strongest_features_where_that_costs_most():
    data, model = batches(images=5), classifier()
    for feature_drop, batch_drop in [(1 / 3, 1 / 3), (0.5, 0.1), (0.1, 0.7)]:
        loss, left = objective(model, data, feature_drop, batch_drop)
        assert 0 < (left.min(1) == 0).sum() < len(left)  # some images are left alone
        actual = gradients(ready(RSC(feature_drop=feature_drop, batch_drop=batch_drop)), data)
        assert_same(actual, gradients_of(model, loss))


def test_the_images_are_chosen_among_all_domains_and_minibatches_may_differ_in_size():
    data, model = unequal_batches(3, 7, 2), classifier()
    loss, left = objective(model, data, 0.4, 0.25)
    hit = torch.tensor(left.min(1) == 0).split((3, 7, 2))
    assert len({domain.double().mean().item() for domain in hit}) > 1  # not the same share of each domain
    assert_same(gradients(ready(RSC(feature_drop=0.4, batch_drop=0.25)), data), gradients_of(model, loss))


def test_how_many_are_the_largest_is_not_left_to_rounding_and_ties_with_the_least_are_among_them():
    for values, share, count in [(64, 1 / 3, 22), (10, 1 / 3, 4), (9, 1 / 3, 3), (2048, 0.5, 1024)]:
        for dtype in (torch.float32, torch.float64):
            rows = torch.randn(5, values, generator=torch.Generator().manual_seed(0)).to(dtype)
            chosen = largest(rows, share)
            assert chosen.sum(1).tolist() == [count] * 5, (values, dtype)
            assert (rows.masked_fill(~chosen, 9).amin(1) > rows.masked_fill(chosen, -9).amax(1)).all()
    assert largest(torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0]), 0.25).tolist() == [True, False, True, True, False]


def test_its_defaults_are_domainbeds():
    algorithm = made("rsc")
    assert (algorithm.feature_drop, algorithm.batch_drop) == (1 / 3, 1 / 3)
