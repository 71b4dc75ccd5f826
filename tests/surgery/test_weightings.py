"""The weighting rules against their definitions: optimality, degenerate matrices, equivariances."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import FAMILIES, VARIANTS, normal
from helpers import in_case
from torch import Tensor

from gsdg.surgery import IMTLG, MGDA, AlignedMTL, CAGrad, DualProj, NashMTL, UPGrad
from gsdg.surgery.rules import _batched_linalg
from gsdg.surgery.rules.dualproj import project_on_dual_cone
from gsdg.utils.errors import UserError

EPS = 1e-12  # of float64 gradients
K = 20  # draws of each family, one per part
P = 20  # elements of a gradient
WEIGHTINGS = [
    "mgda",
    "upgrad",
    "dualproj",
    "cagrad",
    "cagrad c=3",
    "imtl_g",
    "aligned_mtl",
    "aligned_mtl median",
    "aligned_mtl rmse",
    "nash",
]
RULES = {name: VARIANTS[name]() for name in WEIGHTINGS}
INDEPENDENT = ("random", "graded", "nearly identical", "orthogonal")

every_rule = pytest.mark.parametrize("name", RULES)


def draw(D: int, k: int = K) -> Tensor:
    """[D, P, k] float64 gradients."""
    return normal(D, P, k, seed=100 * D)


def family(kind: str, D: int) -> Tensor:
    """Gradients [D, P, K] of one kind."""
    return FAMILIES[kind](draw(D))


def families(D: int, kinds: tuple[str, ...] = tuple(FAMILIES)) -> Tensor:
    """Gradients [D, P, K * kinds] of every kind, for one call of a rule."""
    return torch.cat([family(kind, D) for kind in kinds], dim=-1)


def assert_in_all(fine: Tensor, kinds: tuple[str, ...] = tuple(FAMILIES)) -> None:
    """Assert that fine [..., K * kinds] is True everywhere; the message names the families where it is not."""
    by_kind = fine.reshape(-1, len(kinds), K).all(0).all(-1)
    assert [kind for kind, holds in zip(kinds, by_kind.tolist(), strict=True) if not holds] == []


def gram(J: Tensor) -> Tensor:
    return torch.einsum("ipk,jpk->ijk", J, J)


def unit(J: Tensor) -> Tensor:
    """The Gram matrices of these gradients, divided by their traces."""
    M = gram(J)
    return M / M.diagonal().sum(-1).clamp_min(1e-300)


def update(J: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("ipk,ik->pk", J, w)


def product(M: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("ijk,jk->ik", M, w)


def quadratic(M: Tensor, w: Tensor) -> Tensor:
    return (w * product(M, w)).sum(0)


def lengths_of(M: Tensor) -> Tensor:
    return M.diagonal().t().sqrt()


# ---- every rule


@every_rule
def test_weights_do_not_change_with_the_scale_or_with_the_other_parts(name, monkeypatch):
    """To the bit, also where fewer parts are computed at a time. No parts are no error."""
    M = gram(families(4))
    w = RULES[name].weights(M, EPS)
    for exponent in (-100, 100):  # 1e-30, 1e30; powers of two so that rounding is the same
        with in_case(exponent=exponent):
            assert_in_all(RULES[name].weights(M * 2.0**exponent, EPS) == w)
    M = gram(families(3))
    w = RULES[name].weights(M, EPS)
    assert torch.equal(RULES[name].weights(M[..., 5:6], EPS), w[:, 5:6])
    monkeypatch.setattr(_batched_linalg, "PIECE", 5000)
    assert torch.equal(RULES[name].weights(M, EPS), w)
    assert RULES[name].weights(M[..., :0], EPS).shape == (3, 0)


@every_rule
def test_the_update_does_not_change_with_the_order_of_domains(name):
    for D in (2, 3, 5):
        J = families(D)
        order = torch.randperm(D, generator=torch.Generator().manual_seed(0))
        expected = update(J, RULES[name].weights(gram(J), EPS))
        reordered = update(J[order], RULES[name].weights(gram(J[order]), EPS))
        sizes = J.square().sum((0, 1)).sqrt()
        # CAGrad takes the direction of g_w, 1e-5 short where two gradients are nearly opposite
        with in_case(D=D):
            assert_in_all((reordered - expected).norm(dim=0) <= (1e-4 if "cagrad" in name else 1e-6) * sizes)


@every_rule
def test_identical_gradients_give_that_gradient(name):
    """For sum rules: their sum."""
    assert RULES[name].reduction == ("sum" if name == "nash" else "mean")
    for D, eps in itertools.product(range(1, 7), (1e-6, 1e-12)):
        J = family("identical", D)
        expected = J[0] * (D if name == "nash" else 1)
        assert torch.allclose(update(J, RULES[name].weights(gram(J), eps)), expected, rtol=1e-7), (D, eps)


# ---- MGDA


@pytest.mark.parametrize("D", [*range(1, 7), 8])
def test_mgda_is_the_shortest_vector_of_the_hull(D):
    M = unit(families(D))
    w = MGDA().weights(M, EPS)
    assert (w >= 0).all()
    assert torch.allclose(w.sum(0), torch.ones_like(w[0]), rtol=1e-12)
    inner = product(M, w)
    assert_in_all(inner - (w * inner).sum(0) >= -1e-9)  # the necessary and sufficient condition


def test_mgda_finds_zero_in_the_hull_of_dependent_gradients():
    """Two opposite numbers: w = (1/3, 2/3). The Gram matrix of the only support is singular."""
    J = torch.tensor([[[1.0]], [[-0.5]]], dtype=torch.float64)
    for eps in (1e-6, 1e-12):
        assert torch.allclose(MGDA().weights(gram(J), eps), torch.tensor([[1.0], [2.0]], dtype=J.dtype) / 3), eps


def test_mgda_weighs_short_gradients_exactly():
    """Two short gradients beside a long one: rounding is relative to each, not to the longest."""
    J = torch.tensor([[[1e-4], [1e-4]], [[-1e-4], [1e-4]], [[0], [-1]]], dtype=torch.float64)
    w = MGDA().weights(gram(J), 1e-6)
    assert update(J, w).norm() <= 1e-8
    assert torch.allclose(w[0], w[1], rtol=1e-6)


# ---- UPGrad and DualProj


@pytest.mark.parametrize("D", [*range(1, 7), 8])
def test_projections_meet_the_conditions_of_the_quadratic_program(D):
    """v = argmin v^T M v subject to v >= u: feasible, M v >= 0, and for every domain one of the two is tight."""
    grams = gram(families(D))
    M = _batched_linalg.normalised(grams)
    columns = torch.cat((torch.full((D, 1), 1 / D, dtype=M.dtype), torch.eye(D, dtype=M.dtype) / D), dim=1)
    all_v = project_on_dual_cone(M, columns, EPS)
    for u, v in zip(columns.t()[..., None], all_v.unbind(1), strict=True):
        inner = product(M, v)
        size = (v * lengths_of(M)).sum(0).clamp_min(1)
        assert_in_all(v >= u)
        assert_in_all(inner >= -1e-9 * size)
        assert_in_all((v - u) * inner <= 1e-9 * size.square())
    # v need not be unique, the update is
    for rule, expected in [(DualProj(), all_v[:, 0]), (UPGrad(), all_v[:, 1:].sum(1))]:
        w = rule.weights(grams, EPS)
        assert_in_all(quadratic(M, w - expected) <= 1e-14)
        if D <= 6:
            assert_in_all(product(M, w) >= -1e-9)  # conflicts with no domain


# ---- CAGrad


def cagrad_objective(M: Tensor, w: Tensor, c: float) -> Tensor:
    """F(w) = <g_w, g_0> + c ||g_0|| ||g_w||."""
    inner = M.mean(1)  # <g_i, g_0>
    return (w * inner).sum(0) + c * (inner.mean(0).clamp_min(0) * quadratic(M, w).clamp_min(0)).sqrt()


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 1, 3, 10])
def test_cagrad_has_no_duality_gap(c):
    """min_i <g_i, d> <= F(w) for any d in the ball and any w of the simplex: where they are equal both are optimal."""
    for D in range(2, 7):
        M = unit(families(D))
        weights = CAGrad(c=c, rescale=False).weights(M, EPS)
        radius = c * M.mean((0, 1)).clamp_min(0).sqrt()
        extra = weights - 1 / D
        length = quadratic(M, extra).clamp_min(0).sqrt()  # of d - g_0
        w = extra / extra.sum(0).clamp_min(1e-300)
        gap = cagrad_objective(M, w, c) - product(M, weights).min(0).values
        rounding = radius * D**2 * 2**-51 / quadratic(M, w).clamp_min(1e-300)  # of ||g_w||, where it nearly vanishes
        optimal = ((length - radius).abs() <= 1e-7) & (gap.abs() <= 1e-8 + rounding)
        # at g_0 instead if the hull contains zero or nearly does: g_w vanishes
        still = (extra.abs() <= 1e-12).all(0) & (quadratic(M, MGDA().weights(M, EPS)) <= 2 * EPS)
        with in_case(D=D):
            assert_in_all(extra >= -1e-12)
            assert_in_all(optimal | still | (radius <= 1e-7))
            assert_in_all(optimal[:K], ("random",))


def test_cagrad_without_radius_is_the_mean_and_rescaled_is_divided_by_one_plus_c():
    M = gram(families(4))
    assert (CAGrad(c=0).weights(M, EPS) == 0.25).all()
    assert torch.allclose(CAGrad(c=3).weights(M, EPS), CAGrad(c=3, rescale=False).weights(M, EPS) / 4)


def test_cagrad_is_the_mean_where_the_shortest_vector_vanishes():
    """And not zero: then one domain without a gradient would stop the training of the part."""
    for kind in ("zero row", "opposite pair", "hull holds zero"):
        w = CAGrad(c=3, rescale=False).weights(gram(family(kind, 3)), EPS)
        assert torch.allclose(w, torch.full_like(w, 1 / 3)), kind


def test_cagrad_is_finite_where_the_step_to_the_stationary_point_overflows():
    """Two opposite gradients beside two that are 1e18 times shorter."""
    short = [[4.312382799043707e-37, -4.572964674145481e-37], [-4.572964674145481e-37, 7.986386033940023e-37]]
    M = torch.zeros(4, 4, 1)
    M[:2, :2, 0] = 7.323652267456055 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    M[2:, 2:, 0] = torch.tensor(short)
    for i, value in ((2, 7.688419420939237e-19), (3, -1.3539426683117497e-19)):
        M[0, i] = M[i, 0] = value
        M[1, i] = M[i, 1] = -value
    assert torch.isfinite(CAGrad(c=0.5).weights(M, 1e-6)).all()


# ---- IMTL-G


def test_imtl_g_has_equal_projections_on_all_directions():
    for D in range(2, 7):
        M = unit(families(D, INDEPENDENT))
        w = IMTLG().weights(M, EPS)
        projections = product(M, w) / lengths_of(M)
        with in_case(D=D):
            assert torch.allclose(w.sum(0), torch.ones_like(w[0]), rtol=1e-9)
            spread = (projections - projections.mean(0)).abs()
            assert_in_all(spread <= 1e-6 * projections.abs().amax(0), INDEPENDENT)


def test_imtl_g_of_dependent_gradients_is_the_least_squares_solution():
    """Of the projections onto directions, with equal weight per domain: u = argmin sum_i (<u, g_i / ||g_i||> - 1)^2."""
    for D in range(2, 7):
        J = family("two elements", D)
        directions = (J / lengths_of(gram(J))[:, None]).permute(2, 0, 1)  # [K, D, P]
        ones = torch.ones(K, D, 1, dtype=J.dtype)
        u = torch.linalg.lstsq(directions, ones, driver="gelsd").solution.squeeze(-1).T
        d = update(J, IMTLG().weights(gram(J), EPS))
        # sum_i w_i = 1 sets the length and the sign
        cosine = (d * u).sum(0) / d.norm(dim=0) / u.norm(dim=0)
        assert (cosine.abs() >= 1 - 1e-12).all(), D


def test_imtl_g_weights_two_gradients_by_their_inverse_lengths():
    """Whatever their cosine: the bisector of their directions projects equally on both."""
    for (a, b), cosine, eps in itertools.product([(1e-6, 1), (1, 1e-3), (1, 1)], (-0.999, 0.3, 0.999), (1e-6, 1e-12)):
        M = torch.tensor([[a * a, cosine * a * b], [cosine * a * b, b * b]], dtype=torch.float64)[..., None]
        with in_case(lengths=(a, b), cosine=cosine, eps=eps):
            assert IMTLG().weights(M, eps).flatten().tolist() == pytest.approx([b / (a + b), a / (a + b)], rel=1e-9)


def test_imtl_g_is_zero_where_no_update_has_equal_projections():
    """Gradients along one line, whose weighted sum cancels up to rounding."""
    for lengths in ((1, -1), (3, 4, -5, -1)):
        J = torch.tensor(lengths, dtype=torch.float64)[:, None, None] * draw(1)
        assert (IMTLG().weights(gram(J), EPS) == 0).all(), lengths


# ---- Aligned-MTL


@pytest.mark.parametrize("mode", ["min", "median", "rmse"])
def test_aligned_mtl_is_the_mean_of_the_aligned_gradients(mode):
    """By the singular value decomposition of the gradients: all singular values above 0 are made equal."""
    kinds = ("random", "dimension D", "two elements", "identical pair", "hull holds zero", "zero row", "all zero")
    scale = {"min": Tensor.min, "median": Tensor.median, "rmse": Tensor.mean}[mode]
    for D in range(1, 7):
        J = families(D, kinds)
        U, S, V = torch.linalg.svd(J.permute(2, 0, 1), full_matrices=False)
        kept = S / S[:, :1].clamp_min(1e-300) > 1e-6
        lengths = [scale(s[k].square()).sqrt() if k.any() else s.sum() for s, k in zip(S, kept, strict=True)]
        expected = torch.stack(lengths) * torch.einsum("kir,kr,krp->ipk", U, kept.double(), V).mean(0)
        aligned = update(J, AlignedMTL(scale_mode=mode).weights(gram(J), EPS))
        with in_case(D=D):
            assert_in_all((aligned - expected).norm(dim=0) <= 1e-7 * torch.stack(lengths), kinds)


def test_aligned_mtl_without_gradients_is_the_mean():
    assert (AlignedMTL().weights(gram(family("all zero", 4)), EPS) == 0.25).all()


# ---- Nash-MTL


def test_nash_makes_all_domains_gain_equally():
    for D in (*range(1, 7), 8):
        M = unit(families(D, INDEPENDENT))
        a = NashMTL().weights(M, EPS)
        gains = a * product(M / M.square().sum((0, 1)).sqrt(), a)
        with in_case(D=D):
            assert_in_all(a > 0, INDEPENDENT)
            assert_in_all((gains - 1).abs() <= 1e-9, INDEPENDENT)


@pytest.mark.parametrize(("eps", "rounding"), [(1e-6, 1e-8), (1e-12, 1e-2)])
def test_nash_solves_its_regularised_problem(eps, rounding):
    """b (Q b) = 1 in every family without a zero row; rounding of 1e-16 is multiplied by weights squared, 1 / eps."""
    kinds = tuple(kind for kind in FAMILIES if kind not in ("zero row", "all zero", "one row"))
    for D in (*range(2, 7), 8):
        M = unit(families(D, kinds))
        lengths = lengths_of(M)
        C = M / lengths / lengths[:, None]
        C, factor = C / C.norm(dim=(0, 1)), (M.norm(dim=(0, 1)) / C.norm(dim=(0, 1))).sqrt()
        b = NashMTL().weights(M, eps) * lengths / factor
        gains = b * ((1 - eps) * product(C, b) + eps * b)
        with in_case(D=D):
            assert_in_all(b > 0, kinds)
            assert_in_all(b.square().sum(0) <= 1.01 * D / eps, kinds)
            assert_in_all((gains - 1).abs() <= rounding, kinds)


def test_nash_leaves_out_domains_without_a_gradient():
    J = family("zero row", 4)
    w = NashMTL().weights(gram(J), EPS)
    assert (w[0] == 0).all()
    assert torch.allclose(w[1:], NashMTL().weights(gram(J[1:]), EPS), rtol=1e-9)


@pytest.mark.parametrize(("eps", "size"), [(1e-6, 1e-2), (1e-12, 1e-5)])
def test_nash_stands_still_where_the_hull_holds_zero(eps, size):
    """An opposite pair cannot both gain; a third domain does, by what is orthogonal to the pair."""
    for D in range(2, 7):
        J = family("hull holds zero", D)
        d = update(J, NashMTL().weights(gram(J), eps))
        assert (d.norm(dim=0) <= size * J.square().sum((0, 1)).sqrt()).all(), D
    J = torch.eye(3, P, dtype=torch.float64)
    J[1], J[2, 0] = -J[0], 1
    d = update(J[..., None], NashMTL().weights(gram(J[..., None]), eps)).squeeze(-1)
    assert d[0].abs() <= size
    assert d[2] > 0.1


# ---- wrong options


def test_a_wrong_option_is_refused():
    for c in (-0.1, float("nan"), float("inf"), "0.5", True):
        with in_case(c=c), pytest.raises(UserError, match=r"c is .*a number >= 0"):
            CAGrad(c=c)
    with pytest.raises(UserError, match="scale_mode is 'max'; valid: min, median, rmse"):
        AlignedMTL(scale_mode="max")


# ---- small matrices


def test_solve_leaves_out_what_depends_on_rows_before_and_what_is_masked():
    for n in range(2, 7):
        J = draw(n)
        J[1] = 2 * J[0]
        b = gram(J)[:, 0]  # in the range
        x = _batched_linalg.solve(gram(J), b, EPS)
        mask = torch.arange(n)[:, None] != 0
        rest = _batched_linalg.solve(_batched_linalg.submatrix(mask, gram(J)), b, EPS)
        with in_case(n=n):
            assert (x[1] == 0).all()
            assert torch.allclose(product(gram(J), x), b, rtol=1e-9)
            assert (rest[0] == 0).all()
            assert torch.allclose(rest[1:], _batched_linalg.solve(gram(J[1:]), b[1:], EPS), rtol=1e-9)


def test_solve_measures_a_pivot_against_what_stood_there():
    J = torch.tensor([[1.0, 0, 0], [0, 1e-4, 0], [1, 0, 1e-4]], dtype=torch.float64)
    for eps, expected in [(1e-6, [2, 1, 0]), (1e-9, [1, 1, 1])]:
        x = _batched_linalg.solve(J @ J.T, J @ J.T @ torch.ones(3, dtype=J.dtype), eps)
        assert x.tolist() == pytest.approx(expected), eps


def test_eigh_equals_linalg():
    for D in (*range(1, 9), 12):
        M = unit(families(D))
        values, vectors = _batched_linalg.eigh(M)
        expected = torch.linalg.eigvalsh(M.permute(2, 0, 1)).t()
        eye = torch.eye(D, dtype=M.dtype)[..., None]
        with in_case(D=D):
            assert_in_all((values.sort(0).values - expected).abs() <= 1e-14)
            assert_in_all((torch.einsum("iak,ak,jak->ijk", vectors, values, vectors) - M).abs() <= 2e-14)
            assert_in_all((torch.einsum("iak,ibk->abk", vectors, vectors) - eye).abs() <= 2e-14)


def test_eigh_of_multiple_eigenvalues():
    """Rotations among equal eigenvalues must not undo the others: the hard case of cyclic Jacobi."""
    for D in range(2, 9):
        Q = torch.linalg.qr(normal(1000, D, D))[0]
        eigenvalues = torch.randint(0, 3, (1000, 1, D), generator=torch.Generator().manual_seed(0)).double()
        M = (Q * eigenvalues @ Q.mT).permute(1, 2, 0)
        values, V = _batched_linalg.eigh(M)
        left = torch.einsum("iak,ijk,jbk->abk", V, M, V) - torch.diag_embed(values.t(), dim1=0, dim2=1)
        assert left.abs().max() <= 1e-13, D


def test_eigenvalues_of_short_gradients_have_all_digits():
    """Two short gradients orthogonal to a long one: eigenvalues far below the rounding error of the largest."""
    for short, cosine in itertools.product((1e-3, 1e-6, 1e-8), (-0.9, 0.4)):
        M = torch.eye(3, dtype=torch.float64)
        M[1:, 1:] = short**2 * torch.tensor([[1, cosine], [cosine, 1]], dtype=M.dtype)
        values, _ = _batched_linalg.eigh(M[..., None])
        expected = sorted([1.0, short**2 * (1 - cosine), short**2 * (1 + cosine)])
        with in_case(short=short, cosine=cosine):
            assert values.flatten().sort().values.tolist() == pytest.approx(expected, rel=1e-14, abs=0)


def test_what_exceeds_rounding_is_measured_by_the_gradients_it_is_made_of():
    """Combinations of length 1e-5: by cancellation of gradients of length 1, or a gradient of length 1e-5 itself."""
    M = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1e-10]], dtype=torch.float64)[..., None]
    c = torch.tensor([[1.0, 1, 0], [0, 0, 1]], dtype=M.dtype).t()[..., None]  # [D, 2, 1]
    square = torch.full((2, 1), 1e-10, dtype=M.dtype)
    assert _batched_linalg.exceeds_rounding(square, c, M, 1e-6).flatten().tolist() == [False, True]
