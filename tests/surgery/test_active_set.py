"""The rules that try every subset of up to 8 domains, for more domains: against their definitions and other solvers."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, draw, normal, update_of
from helpers import in_case
from torch import Tensor

from gsdg.surgery import MGDA, CAGrad, Chunk, DualProj, UPGrad
from gsdg.surgery.rules import _batched_linalg, cagrad, dualproj, mgda
from gsdg.surgery.rules._active_set import nonnegative_least_squares

EPS = 1e-12  # of float64 gradients
P = 20  # elements of a gradient: for 40 domains every Gram matrix is singular
K = 5  # draws of each family
MANY = (9, 12, 40)
KINDS = tuple(kind for kind in FAMILIES if kind != "orthogonal")  # there are no 40 orthogonal vectors of 20 elements
# beside a pair with the cosine -1 + 1e-8 the rounding errors of a weight of 1e4 remain
NEARLY_OPPOSITE = torch.tensor([kind == "nearly opposite pair" for kind in KINDS]).repeat_interleave(K)

many = pytest.mark.parametrize("D", MANY)


def families(D: int) -> Tensor:
    """[D, P, K * kinds] float64."""
    J = normal(D, P, K, seed=100 * D)
    return torch.cat([FAMILIES[kind](J) for kind in KINDS], dim=-1)


def unit(J: Tensor) -> Tensor:
    return _batched_linalg.normalised(torch.einsum("ipk,jpk->ijk", J, J))


def product(M: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("ijk,jk->ik", M, w)


def squared(M: Tensor, w: Tensor) -> Tensor:
    """||sum_i w_i g_i||^2."""
    return (w * product(M, w)).sum(0).clamp_min(0)


def assert_everywhere(fine: Tensor) -> None:
    """Assert that fine [..., K * kinds] is True; the message names the families where it is not."""
    by_kind = fine.reshape(-1, len(KINDS), K).all(0).all(-1)
    assert [kind for kind, holds in zip(KINDS, by_kind.tolist(), strict=True) if not holds] == []


# ---- the conditions that only the solution meets


@many
def test_mgda_is_the_shortest_vector_of_the_hull(D):
    M = unit(families(D))
    w = MGDA().weights(M, EPS)
    inner = product(M, w)
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(0), torch.ones_like(w[0]))
    assert_everywhere(inner - (w * inner).sum(0) >= -1e-13)


@many
def test_the_projections_on_the_dual_cone_meet_the_conditions_of_their_program(D):
    """Of the mean gradient, and of each gradient; UPGrad and DualProj have these weights."""
    M = unit(families(D))
    lengths = M.diagonal().t().sqrt()
    u = torch.cat((torch.full((D, 1), 1 / D, dtype=M.dtype), torch.eye(D, dtype=M.dtype) / D), dim=1)
    all_v = dualproj.project_on_dual_cone(M, u, EPS)  # [D, 1 + D, K]
    for lower, v in zip(u.t()[..., None], all_v.unbind(1), strict=True):
        inner, size = product(M, v), (v * lengths).sum(0).clamp_min(1)
        tolerance = 1e-9 * size
        assert_everywhere(v >= lower)
        assert_everywhere(inner >= -tolerance)
        assert_everywhere((v - lower) * inner <= tolerance * size)
    for rule, expected in [(DualProj(), all_v[:, 0]), (UPGrad(), all_v[:, 1:].sum(1))]:
        rounding = 2e-16 * D * expected.square().amax(0).clamp_min(1)  # of a squared length with these weights
        assert_everywhere(squared(M, rule.weights(M, EPS) - expected) <= rounding)


@many
@pytest.mark.parametrize("c", [0.1, 0.5, 1, 3])
def test_cagrad_has_no_duality_gap(D, c):
    """min_i <g_i, d> <= F(w) for any d in the ball and any w of the simplex: where they are equal both are optimal."""
    M = unit(families(D))
    weights, inner = CAGrad(c=c, rescale=False).weights(M, EPS), M.mean(1)
    radius = c * inner.mean(0).clamp_min(0).sqrt()
    extra = weights - 1 / D  # of d - g_0
    distance = squared(M, extra).sqrt()
    w = extra / extra.sum(0).clamp_min(1e-300)
    gap = (w * inner).sum(0) + radius * squared(M, w).sqrt() - product(M, weights).amin(0)
    optimal = ((distance - radius).abs() <= torch.where(NEARLY_OPPOSITE, 1e-5, 1e-7)) & (gap.abs() <= 1e-7)
    still = (extra.abs() <= 1e-12).all(0) & (squared(M, MGDA().weights(M, EPS)) <= 2 * EPS)
    assert_everywhere(extra >= -1e-12)
    assert_everywhere(optimal | still | (radius <= 1e-7))
    assert optimal[:K].all() or D > P, "random gradients, whose hull does not hold 0 for D <= P"


def test_cagrad_does_not_stop_where_the_weighted_gradients_cancel():
    """Small integers: on the way from the best single domain to the minimum, which is below 0, g_w vanishes."""
    rows = [[0, 2], [2, 1], [1, -2], [1, 0], [1, -1], [0, 1], [1, -2], [-1, 2], [0, -1]]
    M = unit(torch.tensor(rows, dtype=torch.float64)[..., None])
    weights = CAGrad(c=0.9, rescale=False).weights(M, EPS)
    assert product(M, weights).amin(0).item() == pytest.approx(-6.425622e-4, rel=1e-6)


# ---- other solvers


def test_up_to_8_domains_the_updates_are_those_of_all_subsets():
    """Of the same convex program. 1e-6: objectives that are equal up to 1e-16 hold points apart by the root of that."""
    for D in (2, 5, 8):
        M, u = unit(families(D)), torch.eye(D, dtype=torch.float64) / D
        with in_case(D=D):
            assert_everywhere(squared(M, mgda.by_active_set(M, EPS) - mgda.shortest(M, EPS)) <= 1e-14)
            ours, theirs = (f(M, u, EPS) for f in (dualproj.by_active_set, dualproj.project_on_dual_cone))
            for i in range(D):
                assert_everywhere(squared(M, ours[:, i] - theirs[:, i]) <= 1e-12)


def test_up_to_8_domains_every_subset_is_tried(monkeypatch):
    for module in (mgda, dualproj, cagrad):
        monkeypatch.setattr(module, "nonnegative_least_squares", None)
    M = unit(families(8))
    for rule in (MGDA(), UPGrad(), DualProj(), CAGrad()):
        assert rule.weights(M[..., ::20], EPS).isfinite().all()
        with pytest.raises(TypeError):
            rule.weights(unit(families(9)), EPS)


@many
def test_updates_are_no_longer_than_those_of_scipys_nonnegative_least_squares(D):
    """On the gradients themselves, not on Gram matrices; K matrices of independent and of dependent gradients.

    Both rules minimise a length over a convex set, so a feasible update that is as short is the same. scipy 1.15 does
    not always find the minimum, later versions do.
    """
    nnls = pytest.importorskip("scipy.optimize").nnls
    for size, kind in ((3 * D, "random"), (P, "random"), (P, "graded"), (P, "identical pair"), (P, "zero row")):
        J = FAMILIES[kind](normal(D, size, 3, seed=D))
        J = J / J.square().sum((0, 1)).sqrt()
        M = unit(J)
        w, v = MGDA().weights(M, EPS), DualProj().weights(M, EPS)
        for k, rows in enumerate(J.unbind(2)):
            # the shortest vector of the hull: t w = argmin ||rows^T x||^2 + (sum x - 1)^2
            x = torch.from_numpy(nnls(torch.cat((rows.t(), rows.new_ones(1, D))).numpy(), [0.0] * size + [1.0])[0])
            y = torch.from_numpy(nnls(rows.t().numpy(), -rows.mean(0).numpy())[0])
            with in_case(size=size, kind=kind, k=k):
                assert (w[:, k] >= 0).all()
                assert w[:, k].sum().item() == pytest.approx(1)
                assert (rows.t() @ w[:, k]).norm() <= (rows.t() @ (x / x.sum())).norm() + 1e-12
                assert (v[:, k] >= 1 / D - 1e-15).all()
                assert (rows.t() @ v[:, k]).norm() <= (rows.mean(0) + rows.t() @ y).norm() + 1e-12


@pytest.mark.parametrize("D", [9, 12])
def test_cagrad_is_no_worse_than_scipys_slsqp(D):
    optimize = pytest.importorskip("scipy.optimize")
    M = unit(normal(D, P, 4, seed=D))
    weights = CAGrad(rescale=False).weights(M, EPS)
    for k in range(M.shape[-1]):
        gram = M[..., k].numpy()
        inner, radius = gram.mean(1), 0.5 * gram.mean() ** 0.5
        result = optimize.minimize(
            lambda w, gram=gram, inner=inner, radius=radius: w @ inner + radius * (w @ gram @ w) ** 0.5,
            [1 / D] * D,
            method="SLSQP",
            bounds=[(0, 1)] * D,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        worst = (gram @ weights[:, k].numpy()).min()  # min_i <g_i, d>, which is at most every F(w)
        assert worst == pytest.approx(result.fun, abs=1e-6), k


# ---- in float32, and as rules


def test_float32_gradients_of_a_random_family_keep_six_digits():
    for D in (9, 30):
        J = normal(D, 200, K, seed=D).float()
        M32 = _batched_linalg.normalised(torch.einsum("ipk,jpk->ijk", J, J).double())
        M = unit(J.double())
        for rule in (MGDA(), UPGrad(), DualProj(), CAGrad()):
            error = squared(M, rule.weights(M32, 1e-6) - rule.weights(M, EPS)).sqrt()
            with in_case(D=D, rule=type(rule).__name__):
                assert (error <= 2e-6 * squared(M, rule.weights(M, EPS)).sqrt()).all()


@pytest.mark.parametrize("name", ["mgda", "upgrad", "dualproj", "cagrad"])
def test_the_rules_combine_nine_domains_by_parts(name):
    """Finite on every family; in float64 never against a domain, but for CAGrad."""
    for kind in FAMILIES:
        for dtype in (torch.float64, torch.float32):
            G = FAMILIES[kind](draw(9, 0)).to(dtype)
            G = G * 1e-6 if kind == "huge" and dtype == torch.float32 else G
            update = update_of(name, G, Chunk(3))
            whole = G @ update_of(name, G)
            with in_case(kind=kind, dtype=dtype):
                assert update.isfinite().all()
                if name != "cagrad" and dtype == torch.float64:
                    assert (whole >= -1e-7 * G.norm(dim=1) * G.norm(dim=1).max()).all()


def test_the_update_does_not_change_with_the_order_of_domains():
    for D in (9, 12):
        J = families(D)
        order = torch.randperm(D, generator=torch.Generator().manual_seed(0))
        for rule in (MGDA(), UPGrad(), DualProj()):
            w = rule.weights(unit(J), EPS)
            reordered = torch.empty_like(w)
            reordered[order] = rule.weights(unit(J[order]), EPS)
            with in_case(D=D, rule=type(rule).__name__):
                assert_everywhere(squared(unit(J), w - reordered) <= 1e-12)


def test_sixty_four_domains_and_no_parts():
    M = unit(normal(64, 100, 2))
    for rule in (MGDA(), DualProj(), CAGrad()):
        assert rule.weights(M, EPS).isfinite().all()
        assert rule.weights(M[..., :0], EPS).shape == (64, 0)
    inner = product(M, MGDA().weights(M, EPS))
    assert (inner.amin(0) >= squared(M, MGDA().weights(M, EPS)) - 1e-13).all()


def test_an_unknown_that_becomes_0_on_the_way_is_used_no_longer():
    """Two unknowns that exclude each other once the third is used: x = (0, 1, 1), found after using x_0 first."""
    A = torch.tensor([[1.0, 0.9, 0.9], [0.9, 1.0, 0.7], [0.9, 0.7, 1.0]], dtype=torch.float64)[..., None]
    b = (A[..., 0] @ torch.tensor([0.0, 1, 1], dtype=torch.float64))[:, None]
    assert b.argmax() == 0
    x = nonnegative_least_squares(A, b, b.new_ones(1), EPS)
    torch.testing.assert_close(x[:, 0], torch.tensor([0.0, 1, 1], dtype=torch.float64))
