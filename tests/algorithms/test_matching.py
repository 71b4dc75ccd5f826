"""MMD, CORAL and CausIRL, and their distances between groups of features, against loops over pairs of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import (
    assert_same,
    batches,
    classifier,
    gradients,
    gradients_of,
    made,
    ready,
    refusal,
    seed_all,
    unequal_batches,
)
from torch import Tensor, nn

from gsdg.algorithms import CORAL, ERM, MMD, CausIRLCORAL, CausIRLMMD
from gsdg.algorithms.common.distances import gaussian_mmd, moment_distance
from gsdg.types import Batch, join

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
    """The covariance [F, F] of [n, F], divided by n - 1."""
    errors = rows - rows.sum(0) / len(rows)
    return sum(torch.outer(error, error) for error in errors) / (len(rows) - 1)


def over_pairs(distance: Distance, groups: Sequence[Tensor]) -> Tensor:
    return torch.stack([distance(left, right) for left, right in combinations(groups, 2)]).mean()


def objective(model: nn.Module, data: Sequence[Batch], penalty: Tensor, weight: float) -> Tensor:
    """The cross-entropy of all images and the penalty."""
    joint = join(data)
    return F.cross_entropy(model(joint.images), joint.labels) + weight * penalty


def features_of(model: nn.Module, data: Sequence[Batch]) -> list[Tensor]:
    """The features of each domain, with one forward pass per domain."""
    return [model.featurize(batch.images) for batch in data]


def mixtures(groups: Sequence[Tensor], cuts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The rows of every group before its cut, and all other rows."""
    first = [row for rows, cut in zip(groups, cuts, strict=True) for row in list(rows)[:cut]]
    second = [row for rows, cut in zip(groups, cuts, strict=True) for row in list(rows)[cut:]]
    return torch.stack(first), torch.stack(second)


def draw(monkeypatch, cuts: Sequence[int], sizes: Sequence[int]) -> None:
    """Make these cuts numpy's next draws, each requested as one of 0, ..., size - 1."""
    left = {(0, size): cut for size, cut in zip(sizes, cuts, strict=True)}
    monkeypatch.setattr(np.random, "randint", lambda low, high: left.pop((low, high)))


DISTANCES = {MMD: explicit_mmd, CORAL: explicit_moments, CausIRLMMD: explicit_mmd, CausIRLCORAL: explicit_moments}
SIZES = (5, 4, 3)  # images of each domain

# ---- the distances ---------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize(
    ("distance", "explicit"), [(gaussian_mmd, explicit_mmd), (moment_distance, explicit_moments)]
)


def groups(*sizes: int, features: int = 6, scale: float = 0.5, offset: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, features, generator=generator, dtype=torch.float64) for size in sizes]
    return [offset + scale * (1 + 0.2 * i) * rows for i, rows in enumerate(drawn)]


def with_gradient(distance, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The distance, and its gradient with respect to all rows, [N, F]."""
    leaves = [group.clone().requires_grad_() for group in rows]
    value = distance(leaves)
    return value.detach(), torch.cat(torch.autograd.grad(value, leaves))


@BOTH
def test_a_distance_is_the_mean_over_all_pairs_also_if_rows_are_equal(distance, explicit):
    """Images are drawn with replacement: a row may come twice, in a group and in two; squared distances there are 0."""
    first, second = groups(4, 4)
    first[1], second[2] = first[0], first[0]
    for rows in [*(groups(*sizes) for sizes in [(4, 4), (3, 5), (4, 4, 4), (2, 3, 5, 4)]), [first, second]]:
        expected = with_gradient(lambda rows: over_pairs(explicit, rows), rows)
        torch.testing.assert_close(with_gradient(distance, rows), expected)


@BOTH
def test_groups_of_the_same_rows_are_at_distance_0_without_a_gradient(distance, explicit):
    rows = groups(4)[0]
    value, gradient = with_gradient(distance, [rows, rows])
    assert abs(value) < 1e-14
    assert gradient.abs().max() < 1e-12


def test_rows_far_apart_have_constant_kernels():
    """exp(-1000 * 1e8) is 0, and so is its gradient; what is left is k(x, x) = 7 of each row with itself."""
    value, gradient = with_gradient(gaussian_mmd, groups(4, 4, scale=1e4))
    torch.testing.assert_close(value, torch.tensor(7 / 4 + 7 / 4, dtype=torch.float64))
    assert gradient.abs().max() == 0


@BOTH
def test_float32_is_right_to_rounding_with_an_offset_and_with_features_that_have_come_close(distance, explicit):
    """A plain |x|^2 + |y|^2 - 2 x.y has a gradient that is off by 1% and more here: rounding times the largest g."""
    for scale, offset in [(0.4, 0.0), (0.01, 1.0), (0.001, 0.5)]:
        single = [rows.float() for rows in groups(5, 5, 5, features=256, scale=scale, offset=offset)]
        exact = with_gradient(lambda rows: over_pairs(explicit, rows), [rows.double() for rows in single])
        value, gradient = with_gradient(distance, single)
        assert value.dtype == gradient.dtype == torch.float32
        assert (value - exact[0]).abs() < 1e-4 * exact[0], scale
        assert (gradient - exact[1]).norm() < 1e-5 * exact[1].norm(), scale


@BOTH
def test_nothing_is_read_on_the_host(distance, explicit):
    """Tensors on the meta device have no values: to read one is an error."""
    rows = [torch.empty(4, 6, device="meta", requires_grad=True) for _ in range(3)]
    distance(rows).backward()
    assert rows[0].grad.shape == (4, 6)


# ---- MMD and CORAL ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MMD, CORAL])
@pytest.mark.parametrize("sizes", [(4, 4, 4), (5, 4, 3), (4, 4)])
def test_the_penalty_is_the_mean_distance_of_pairs_of_domains(kind, sizes):
    data, model = unequal_batches(*sizes), classifier()
    algorithm = ready(kind(penalty_weight=3.0), domains=len(data))
    penalty = over_pairs(DISTANCES[kind], features_of(model, data))
    nll, expected = (objective(model, data, penalty, weight) for weight in (0.0, 3.0))
    assert_same(gradients(algorithm, data), gradients_of(model, expected))
    metrics = algorithm.backward(data)
    assert metrics["penalty"].item() == pytest.approx(penalty.item(), rel=1e-9)
    assert metrics["nll"].item() == pytest.approx(nll.item(), rel=1e-12)
    assert metrics["loss"].item() == pytest.approx(metrics["nll"].item() + 3 * penalty.item(), rel=1e-9)


def test_the_weight_of_the_configs():
    for name in ("mmd", "coral", "causirl_mmd", "causirl_coral"):
        assert made(name).penalty_weight == 1.0


def test_one_image_per_domain_is_enough_for_mmd_and_is_refused_by_coral():
    data, model = batches(images=1), classifier()
    penalty = over_pairs(explicit_mmd, features_of(model, data))
    actual = gradients(ready(MMD(penalty_weight=1.0)), data)
    assert_same(actual, gradients_of(model, objective(model, data, penalty, 1.0)))
    message = refusal(ready(CORAL(penalty_weight=1.0)).backward, data)
    assert "at least 2 images of each domain, found 1: raise trainer.batch_size" in message


# ---- CausIRL ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CausIRLMMD, CausIRLCORAL])
def test_the_penalty_is_the_distance_of_two_mixtures(monkeypatch, kind):
    data, model = unequal_batches(*SIZES), classifier()
    for cuts in [(2, 3, 1), (0, 2, 0), (4, 3, 0), (0, 0, 2)]:
        penalty = DISTANCES[kind](*mixtures(features_of(model, data), cuts))
        draw(monkeypatch, cuts, SIZES)
        actual = gradients(ready(kind(penalty_weight=3.0)), data)
        assert_same(actual, gradients_of(model, objective(model, data, penalty, 3.0)))


@pytest.mark.parametrize("kind", [CausIRLMMD, CausIRLCORAL])
def test_the_cuts_are_numpys_next_draws_one_per_domain(kind):
    data, model = batches(images=6), classifier()
    seed_all(4)
    cuts = [np.random.randint(0, 6) for _ in data]
    assert len(set(cuts)) > 1
    penalty = DISTANCES[kind](*mixtures(features_of(model, data), cuts))
    actual = gradients(ready(kind(penalty_weight=1.0)), data, seed=4)
    assert_same(actual, gradients_of(model, objective(model, data, penalty, 1.0)))


@pytest.mark.parametrize("kind", [CausIRLMMD, CausIRLCORAL])
def test_a_mixture_of_fewer_than_2_images_has_no_penalty(monkeypatch, kind):
    data, algorithm = unequal_batches(*SIZES), ready(kind(penalty_weight=3.0))
    for cuts in [(0, 0, 0), (1, 0, 0), (0, 0, 1)]:
        draw(monkeypatch, cuts, SIZES)
        assert algorithm.backward(data)["penalty"].item() == 0
        draw(monkeypatch, cuts, SIZES)
        assert_same(gradients(algorithm, data), gradients(ready(ERM()), data), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [CausIRLMMD, CausIRLCORAL])
def test_with_one_image_per_domain_it_is_erm(kind):
    """All images are in the second mixture: the first part of a minibatch is never the complete minibatch."""
    actual, expected = (gradients(ready(made), batches(images=1)) for made in (kind(penalty_weight=3.0), ERM()))
    assert_same(actual, expected, rtol=1e-12, atol=1e-14)
