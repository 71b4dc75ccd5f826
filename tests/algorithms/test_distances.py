"""Distances between groups of features, against loops over pairs; and what float32 leaves of them."""

from __future__ import annotations

import pytest
import torch
from distance_cases import explicit_mmd, explicit_moments, over_pairs
from torch import Tensor

from gsdg.algorithms.distances import gaussian_mmd, moments
from gsdg.errors import UserError

BOTH = pytest.mark.parametrize(("distance", "explicit"), [(gaussian_mmd, explicit_mmd), (moments, explicit_moments)])


def groups(*sizes: int, features: int = 6, scale: float = 0.5, offset: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, features, generator=generator, dtype=torch.float64) for size in sizes]
    return [offset + scale * (1 + 0.2 * i) * rows for i, rows in enumerate(drawn)]


def with_gradient(distance, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The distance, and its gradient in all rows, [N, F]."""
    leaves = [own.clone().requires_grad_() for own in rows]
    value = distance(leaves)
    return value.detach(), torch.cat(torch.autograd.grad(value, leaves))


@BOTH
@pytest.mark.parametrize("sizes", [(4, 4), (3, 5), (4, 4, 4), (2, 3, 5, 4)])
def test_the_mean_over_all_pairs(distance, explicit, sizes):
    found = with_gradient(distance, groups(*sizes))
    torch.testing.assert_close(found, with_gradient(lambda rows: over_pairs(explicit, rows), groups(*sizes)))


@BOTH
def test_groups_of_the_same_rows_are_at_distance_0_without_a_gradient(distance, explicit):
    rows = groups(4)[0]
    value, gradient = with_gradient(distance, [rows, rows])
    assert abs(value) < 1e-14
    assert gradient.abs().max() < 1e-12


@BOTH
def test_equal_rows_do_no_harm(distance, explicit):
    """Images are drawn with replacement: a row may come twice, in a group and in two; squared distances there are 0."""
    first, second = groups(4, 4)
    first[1], second[2] = first[0], first[0]
    found = with_gradient(distance, [first, second])
    torch.testing.assert_close(found, with_gradient(lambda rows: explicit(*rows), [first, second]))


def test_rows_far_apart_have_constant_kernels():
    """exp(-1000 * 1e8) is 0, and so is its gradient; what is left is k(x, x) = 7 of each row with itself."""
    value, gradient = with_gradient(gaussian_mmd, groups(4, 4, scale=1e4))
    torch.testing.assert_close(value, torch.tensor(7 / 4 + 7 / 4, dtype=torch.float64))
    assert gradient.abs().max() == 0


@BOTH
@pytest.mark.parametrize(("scale", "offset"), [(0.4, 0.0), (0.01, 1.0), (0.001, 0.5)])
def test_float32_is_right_to_rounding_with_an_offset_and_with_features_that_have_come_close(
    distance, explicit, scale, offset
):
    """A plain |x|^2 + |y|^2 - 2 x.y has a gradient that is off by 1% and more here: rounding times the largest g."""
    single = [rows.float() for rows in groups(5, 5, 5, features=256, scale=scale, offset=offset)]
    exact = with_gradient(lambda rows: over_pairs(explicit, rows), [rows.double() for rows in single])
    value, gradient = with_gradient(distance, single)
    assert value.dtype == gradient.dtype == torch.float32
    assert (value - exact[0]).abs() < 1e-4 * exact[0]
    assert (gradient - exact[1]).norm() < 1e-5 * exact[1].norm()


def test_a_covariance_of_one_row_is_refused():
    with pytest.raises(UserError, match="2 images or more of each domain, found 1: raise trainer.batch_size"):
        moments(groups(3, 1))


@BOTH
def test_nothing_is_read_on_the_host(distance, explicit):
    """Tensors on the meta device have no values: to read one is an error."""
    rows = [torch.empty(4, 6, device="meta", requires_grad=True) for _ in range(3)]
    distance(rows).backward()
    assert rows[0].grad.shape == (4, 6)
