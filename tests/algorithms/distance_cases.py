"""What the tests of distances share: two groups' distance in a slow, obvious form, and the objective it is part of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.batch import Batch

Distance = Callable[[Tensor, Tensor], Tensor]


def kernel(x: Tensor, y: Tensor) -> Tensor:
    squared = (x - y).square().sum()
    return sum(torch.exp(-bandwidth * squared) for bandwidth in (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0))


def mean_kernel(left: Tensor, right: Tensor) -> Tensor:
    return torch.stack([kernel(x, y) for x in left for y in right]).mean()


def explicit_mmd(left: Tensor, right: Tensor) -> Tensor:
    return mean_kernel(left, left) + mean_kernel(right, right) - 2 * mean_kernel(left, right)


def explicit_moments(left: Tensor, right: Tensor) -> Tensor:
    means = (left.sum(0) / len(left) - right.sum(0) / len(right)).square().mean()
    return means + (covariance(left) - covariance(right)).square().mean()


def covariance(rows: Tensor) -> Tensor:
    """[n, F] -> [F, F], with n - 1."""
    errors = rows - rows.sum(0) / len(rows)
    return sum(torch.outer(error, error) for error in errors) / (len(rows) - 1)


def over_pairs(distance: Distance, groups: Sequence[Tensor]) -> Tensor:
    return torch.stack([distance(left, right) for left, right in combinations(groups, 2)]).mean()


def objective(model: nn.Module, data: Sequence[Batch], penalty: Tensor, weight: float) -> Tensor:
    """The cross-entropy of all images and the penalty."""
    images, labels = torch.cat([batch.images for batch in data]), torch.cat([batch.labels for batch in data])
    return F.cross_entropy(model(images), labels) + weight * penalty


def features(model: nn.Module, data: Sequence[Batch]) -> list[Tensor]:
    """A forward pass a domain."""
    return [model.featurize(batch.images) for batch in data]


def unequal(data: Sequence[Batch]) -> list[Batch]:
    """Domain d without its last d images."""
    return [Batch(b.images[: len(b.labels) - d], b.labels[: len(b.labels) - d], b.domain) for d, b in enumerate(data)]


def mixtures(groups: Sequence[Tensor], cuts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The first rows of every group, up to its cut, and all others."""
    first = [row for rows, cut in zip(groups, cuts, strict=True) for row in list(rows)[:cut]]
    second = [row for rows, cut in zip(groups, cuts, strict=True) for row in list(rows)[cut:]]
    return torch.stack(first), torch.stack(second)


def draw(monkeypatch, cuts: Sequence[int], sizes: Sequence[int]) -> None:
    """numpy's next draws are to be these cuts, each asked for as one of 0, ..., size - 1."""
    left = {(0, size): cut for size, cut in zip(sizes, cuts, strict=True)}
    monkeypatch.setattr(np.random, "randint", lambda low, high: left.pop((low, high)))
