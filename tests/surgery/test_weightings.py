"""The weighting rules against their definitions: optimality, degenerate matrices, equivariances."""

from __future__ import annotations

import itertools

import pytest
import torch

from gsdg.errors import UserError
from gsdg.surgery.rules import small
from gsdg.surgery.rules.aligned_mtl import AlignedMTL
from gsdg.surgery.rules.cagrad import CAGrad
from gsdg.surgery.rules.dualproj import DualProj, project
from gsdg.surgery.rules.imtl_g import IMTLG
from gsdg.surgery.rules.mgda import MGDA
from gsdg.surgery.rules.nash import NashMTL
from gsdg.surgery.rules.upgrad import UPGrad

EPS = 1e-12  # of float64 gradients
K = 20  # draws of each family, one a part
P = 20  # elements of a gradient
RULES = {
    "mgda": MGDA(),
    "upgrad": UPGrad(),
    "dualproj": DualProj(),
    "cagrad": CAGrad(),
    "cagrad c=3": CAGrad(c=3),
    "imtl_g": IMTLG(),
    "aligned_mtl": AlignedMTL(),
    "aligned_mtl median": AlignedMTL(scale_mode="median"),
    "aligned_mtl rmse": AlignedMTL(scale_mode="rmse"),
    "nash": NashMTL(),
}
UP_TO_8 = ["mgda", "upgrad", "dualproj", "cagrad"]
rules = pytest.mark.parametrize("name", RULES)
domains = pytest.mark.parametrize("D", range(1, 7))
up_to_8 = pytest.mark.parametrize("D", [*range(1, 7), 8])


def draw(D: int, n: int = P, k: int = K) -> torch.Tensor:
    """[D, P, k] float64 gradients, 0 after their first n elements."""
    J = torch.randn(D, P, k, generator=torch.Generator().manual_seed(100 * D + n), dtype=torch.float64)
    J[:, n:] = 0
    return J


def gram(J: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ipk,jpk->ijk", J, J)


def unit(J: torch.Tensor) -> torch.Tensor:
    """Their Gram matrices divided by their traces."""
    M = gram(J)
    return M / M.diagonal().sum(-1).clamp_min(1e-300)


def update(J: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ipk,ik->pk", J, w)


def product(M: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ijk,jk->ik", M, w)


def quadratic(M: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (w * product(M, w)).sum(0)


def lengths_of(M: torch.Tensor) -> torch.Tensor:
    return M.diagonal().t().sqrt()


def family(kind: str, D: int) -> torch.Tensor:
    """Gradients [D, P, K] of one kind."""
    J = draw(D)
    first, last = torch.zeros(D, 1, 1, dtype=J.dtype), torch.zeros(D, 1, 1, dtype=J.dtype)
    first[0] = last[-1] = 1
    graded = torch.logspace(-4, 0, D, dtype=J.dtype)[:, None, None]
    return {
        "random": lambda: J,
        "dimension D": lambda: draw(D, D),
        "one element": lambda: draw(D, 1),
        "two elements": lambda: draw(D, 2),
        "zero row": lambda: J * (1 - first),
        "all zero": lambda: J * 0,
        "one row": lambda: J * first,
        "identical": lambda: J[:1].expand_as(J),
        "identical pair": lambda: J * (1 - last) + J[:1] * last,
        "opposite pair": lambda: J * (1 - last) - J[:1] * last,
        "nearly opposite pair": lambda: J * (1 - last) - (J[:1] + 1e-4 * J) * last,
        "hull holds zero": lambda: J - J.mean(0),
        "graded": lambda: J * graded,
        "graded, three elements": lambda: draw(D, 3) * graded,
        "nearly identical": lambda: J[:1] + 1e-3 * J,
        "orthogonal": lambda: torch.eye(D, P, dtype=J.dtype).unsqueeze(-1).expand_as(J),
    }[kind]()


KINDS = (
    *("random", "dimension D", "one element", "two elements", "zero row", "all zero", "one row", "identical"),
    *("identical pair", "opposite pair", "nearly opposite pair", "hull holds zero", "graded"),
    *("graded, three elements", "nearly identical", "orthogonal"),
)


def families(D: int, kinds: tuple[str, ...] = KINDS) -> torch.Tensor:
    """Gradients [D, P, K * kinds] of every kind that a rule meets: one call serves all."""
    return torch.cat([family(kind, D) for kind in kinds], dim=-1)


def assert_in_all(fine: torch.Tensor, kinds: tuple[str, ...] = KINDS) -> None:
    """fine [..., K * kinds] holds everywhere; the families where it does not are named."""
    by_kind = fine.reshape(-1, len(kinds), K).all(0).all(-1)
    assert [kind for kind, holds in zip(kinds, by_kind.tolist(), strict=True) if not holds] == []


# ---- every rule


@rules
@domains
@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_weights_are_finite(name, D, eps):
    w = RULES[name].weights(gram(families(D)), eps)
    assert w.dtype == torch.float64
    assert_in_all(w.isfinite())


@rules
def test_weights_do_not_change_with_the_scale(name):
    M = gram(families(4))
    w = RULES[name].weights(M, EPS)
    for exponent in (-100, 100):  # 1e-30, 1e30; powers of two so that rounding is the same
        assert_in_all(RULES[name].weights(M * 2.0**exponent, EPS) == w)


@rules
@pytest.mark.parametrize("D", [2, 3, 5])
def test_the_update_does_not_change_with_the_order_of_domains(name, D):
    J = families(D)
    order = torch.randperm(D, generator=torch.Generator().manual_seed(0))
    expected = update(J, RULES[name].weights(gram(J), EPS))
    found = update(J[order], RULES[name].weights(gram(J[order]), EPS))
    sizes = J.square().sum((0, 1)).sqrt()
    # CAGrad takes the direction of g_w, 1e-5 short where two gradients are nearly opposite
    assert_in_all((found - expected).norm(dim=0) <= (1e-4 if "cagrad" in name else 1e-6) * sizes)


@rules
@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_one_domain_has_the_weight_one(name, eps):
    w = RULES[name].weights(gram(draw(1)) * 1e-10, eps)
    assert torch.allclose(w, torch.ones(1, K, dtype=torch.float64), rtol=1e-14)


@rules
@pytest.mark.parametrize("D", range(2, 7))
@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_identical_gradients_give_that_gradient(name, D, eps):
    """Their sum where the rule is a sum."""
    J = family("identical", D)
    times = D if name == "nash" else 1
    assert RULES[name].reduction == ("sum" if name == "nash" else "mean")
    assert torch.allclose(update(J, RULES[name].weights(gram(J), eps)), times * J[0], rtol=1e-7)


@rules
@pytest.mark.parametrize("D", [1, 3])
def test_runs_without_reading_values_on_the_host(name, D):
    """On the meta device there are no values: anything that looked at one would raise."""
    RULES[name].start_step(D)
    M = torch.empty(D, D, 7, device="meta", dtype=torch.float64)
    assert RULES[name].weights(M, EPS).shape == (D, 7)
    coefficients, metrics = RULES[name].coefficients(M, EPS)
    assert coefficients.shape == (D, D, 7)
    assert metrics["conflict_rate"].shape == ()


@rules
def test_no_parts_are_no_error(name):
    assert RULES[name].weights(torch.zeros(3, 3, 0, dtype=torch.float64), EPS).shape == (3, 0)


@rules
def test_parts_do_not_mix(name, monkeypatch):
    """A part alone, and pieces of few parts, have the weights that they have among all."""
    M = gram(families(3))
    w = RULES[name].weights(M, EPS)
    assert torch.equal(RULES[name].weights(M[..., 5:6], EPS), w[:, 5:6])
    monkeypatch.setattr(small, "PIECE", 5000)
    assert torch.equal(RULES[name].weights(M, EPS), w)


@pytest.mark.parametrize("name", UP_TO_8)
def test_more_than_8_domains_are_refused(name):
    RULES[name].start_step(8)
    with pytest.raises(UserError, match="all 2\\^D subsets .* there are 9 domains; valid: 1 to 8"):
        RULES[name].start_step(9)


@rules
@pytest.mark.parametrize("D", range(2, 7))
def test_rounding_of_float32_gradients_moves_the_update_little(name, D):
    """Gram matrices known to 1e-7 only, of gradients that are neither dependent nor close to it."""
    J = draw(D, k=100)
    exact = update(J, RULES[name].weights(gram(J), EPS))
    rounded = update(J, RULES[name].weights(gram(J.float()).double(), 1e-6))
    close = (rounded - exact).norm(dim=0) <= 1e-4 * exact.norm(dim=0)
    assert close.double().mean() >= 0.98


# ---- MGDA


@up_to_8
def test_mgda_is_the_shortest_vector_of_the_hull(D):
    M = unit(families(D))
    w = MGDA().weights(M, EPS)
    assert (w >= 0).all()
    assert torch.allclose(w.sum(0), torch.ones_like(w[0]), rtol=1e-12)
    inner = product(M, w)
    assert_in_all(inner - (w * inner).sum(0) >= -1e-9)  # the necessary and sufficient condition


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_mgda_finds_zero_in_the_hull_of_dependent_gradients(eps):
    """Two opposite numbers: w = (1/3, 2/3). The Gram matrix of the only support is singular."""
    J = torch.tensor([[[1.0]], [[-0.5]]], dtype=torch.float64)
    assert torch.allclose(MGDA().weights(gram(J), eps), torch.tensor([[1.0], [2.0]], dtype=J.dtype) / 3)


def test_mgda_weighs_short_gradients_exactly():
    """Two short gradients beside a long one: rounding is relative to each, not to the longest."""
    J = torch.tensor([[[1e-4], [1e-4]], [[-1e-4], [1e-4]], [[0], [-1]]], dtype=torch.float64)
    w = MGDA().weights(gram(J), 1e-6)
    assert update(J, w).norm() <= 1e-8
    assert torch.allclose(w[0], w[1], rtol=1e-6)


# ---- UPGrad and DualProj


@up_to_8
def test_projections_meet_the_conditions_of_the_quadratic_program(D):
    """v = argmin v^T M v subject to v >= u: feasible, M v >= 0, and for every domain one of the two is tight."""
    grams = gram(families(D))
    M = small.normalised(grams)
    columns = torch.cat((torch.full((D, 1), 1 / D, dtype=M.dtype), torch.eye(D, dtype=M.dtype) / D), dim=1)
    all_v = project(M, columns, EPS)
    for u, v in zip(columns.t()[..., None], all_v.unbind(1), strict=True):
        inner = product(M, v)
        size = (v * lengths_of(M)).sum(0).clamp_min(1)
        assert_in_all(v >= u)
        assert_in_all(inner >= -1e-9 * size)
        assert_in_all((v - u) * inner <= 1e-9 * size.square())
    # v need not be unique, the update is
    assert_in_all(quadratic(M, DualProj().weights(grams, EPS) - all_v[:, 0]) <= 1e-14)
    assert_in_all(quadratic(M, UPGrad().weights(grams, EPS) - all_v[:, 1:].sum(1)) <= 1e-14)


@pytest.mark.parametrize("name", ["mgda", "upgrad", "dualproj"])
@domains
def test_the_update_conflicts_with_no_domain(name, D):
    M = unit(families(D))
    assert_in_all(product(M, RULES[name].weights(M, EPS)) >= -1e-9)


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_without_conflict_projections_are_the_mean(name):
    assert (RULES[name].weights(gram(draw(4).abs()), EPS) == 0.25).all()


def test_two_conflicting_gradients_are_projected_as_on_paper():
    """g_1 = (1, 0), g_2 = (-1, 1): each onto the other's orthogonal complement, v_2 = -<g_1, g_2> / ||g_2||^2 u_1."""
    M = gram(torch.tensor([[[1.0], [0]], [[-1], [1]]], dtype=torch.float64))
    assert UPGrad().weights(M, EPS).flatten().tolist() == pytest.approx([0.5 + 0.5, 0.25 + 0.5])
    assert DualProj().weights(M, EPS).flatten().tolist() == pytest.approx([0.5, 0.5])


# ---- CAGrad


@pytest.mark.parametrize("D", range(2, 7))
@pytest.mark.parametrize("c", [0.1, 0.5, 1, 3])
def test_cagrad_has_no_duality_gap(D, c):
    """min_i <g_i, d> <= F(w) for any d in the ball and any w of the simplex: where they are equal both are optimal."""
    M = unit(families(D))
    weights = CAGrad(c=c, rescale=False).weights(M, EPS)
    inner = M.mean(1)  # <g_i, g_0>
    radius = c * inner.mean(0).clamp_min(0).sqrt()
    extra = weights - 1 / D
    length = quadratic(M, extra).clamp_min(0).sqrt()  # of d - g_0
    w = extra / extra.sum(0).clamp_min(1e-300)
    value = (w * inner).sum(0) + radius * quadratic(M, w).clamp_min(0).sqrt()
    worst = product(M, weights).min(0).values
    optimal = ((length - radius).abs() <= 1e-7) & ((value - worst).abs() <= 1e-8)
    # at g_0 instead where the hull holds zero or nearly: g_w vanishes
    still = (extra.abs() <= 1e-12).all(0) & (quadratic(M, MGDA().weights(M, EPS)) <= 2 * EPS)
    assert_in_all(extra >= -1e-12)
    assert_in_all(optimal | still | (radius <= 1e-7))
    assert_in_all(optimal[:K], KINDS[:1])


@pytest.mark.parametrize("D", range(2, 7))
def test_cagrad_is_beaten_by_no_point_of_the_simplex(D):
    M = unit(draw(D))
    inner = M.mean(1)
    radius = 0.5 * inner.mean(0).sqrt()
    generator = torch.Generator().manual_seed(D)

    def F(w):
        return (w * inner).sum(0) + radius * quadratic(M, w).clamp_min(0).sqrt()

    extra = CAGrad(rescale=False).weights(M, EPS) - 1 / D
    best = F(extra / extra.sum(0))
    for _ in range(300):
        point = -torch.rand(D, K, generator=generator, dtype=M.dtype).log()
        assert (F(point / point.sum(0)) >= best - 1e-12).all()


def test_cagrad_without_radius_is_the_mean():
    assert (CAGrad(c=0).weights(gram(families(4)), EPS) == 0.25).all()


def test_cagrad_rescaled_is_the_papers_over_one_plus_c():
    M = gram(families(4))
    assert torch.allclose(CAGrad(c=3).weights(M, EPS), CAGrad(c=3, rescale=False).weights(M, EPS) / 4)


@pytest.mark.parametrize("kind", ["zero row", "opposite pair", "hull holds zero"])
def test_cagrad_is_the_mean_where_the_shortest_vector_vanishes(kind):
    """And not zero: one domain without a gradient would stop the part."""
    w = CAGrad(c=3, rescale=False).weights(gram(family(kind, 3)), EPS)
    assert torch.allclose(w, torch.full_like(w, 1 / 3))


@pytest.mark.parametrize("c", [-0.1, float("nan"), float("inf"), "0.5", True])
def test_cagrad_refuses_a_c_that_is_no_distance(c):
    with pytest.raises(UserError, match=r"c is .*a number >= 0"):
        CAGrad(c=c)


# ---- IMTL-G


@pytest.mark.parametrize("D", range(2, 7))
def test_imtl_g_has_equal_projections_on_all_directions(D):
    kinds = ("random", "graded", "nearly identical", "orthogonal")
    M = unit(families(D, kinds))
    w = IMTLG().weights(M, EPS)
    projections = product(M, w) / lengths_of(M)
    assert torch.allclose(w.sum(0), torch.ones_like(w[0]), rtol=1e-9)
    assert_in_all((projections - projections.mean(0)).abs() <= 1e-6 * projections.abs().amax(0), kinds)


@pytest.mark.parametrize("D", range(2, 7))
def test_imtl_g_of_dependent_gradients_is_the_least_squares_solution(D):
    """Of the projections on directions, each domain's counting alike: u = argmin sum_i (<u, g_i / ||g_i||> - 1)^2."""
    J = family("two elements", D)
    directions = (J / lengths_of(gram(J))[:, None]).permute(2, 0, 1)  # [K, D, P]
    u = torch.linalg.lstsq(directions, torch.ones(K, D, 1, dtype=J.dtype), driver="gelsd").solution.squeeze(-1).T
    found = update(J, IMTLG().weights(gram(J), EPS))
    # sum_i w_i = 1 sets the length and the sign
    cosine = (found * u).sum(0) / found.norm(dim=0) / u.norm(dim=0)
    assert_in_all(cosine.abs() >= 1 - 1e-12, ("two elements",))


@pytest.mark.parametrize("lengths", [(1e-6, 1), (1, 1e-3), (1, 1)])
@pytest.mark.parametrize("cosine", [-0.999, 0.3, 0.999])
@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_imtl_g_weights_two_gradients_by_their_inverse_lengths(lengths, cosine, eps):
    """Whatever their cosine: the bisector of their directions projects equally on both."""
    a, b = lengths
    M = torch.tensor([[a * a, cosine * a * b], [cosine * a * b, b * b]], dtype=torch.float64)[..., None]
    assert IMTLG().weights(M, eps).flatten().tolist() == pytest.approx([b / (a + b), a / (a + b)], rel=1e-9)


@pytest.mark.parametrize("lengths", [(1, -1), (3, 4, -5, -1)])
def test_imtl_g_is_zero_where_no_update_has_equal_projections(lengths):
    """Gradients along one line: what they push one way and the other cancels but for rounding."""
    J = torch.tensor(lengths, dtype=torch.float64)[:, None, None] * draw(1)
    assert (IMTLG().weights(gram(J), EPS) == 0).all()


# ---- Aligned-MTL


@domains
@pytest.mark.parametrize("mode", ["min", "median", "rmse"])
def test_aligned_mtl_is_the_mean_of_the_aligned_gradients(D, mode):
    """By the singular value decomposition of the gradients: all singular values above 0 are made equal."""
    kinds = ("random", "dimension D", "two elements", "identical pair", "hull holds zero", "zero row", "all zero")
    J = families(D, kinds)
    U, S, V = torch.linalg.svd(J.permute(2, 0, 1), full_matrices=False)
    kept = S / S[:, :1].clamp_min(1e-300) > 1e-6
    scale = {"min": torch.Tensor.min, "median": torch.Tensor.median, "rmse": torch.Tensor.mean}[mode]
    lengths = [scale(s[k].square()).sqrt() if k.any() else s.sum() for s, k in zip(S, kept, strict=True)]
    directions = torch.einsum("kir,kr,krp->ipk", U, kept.double(), V).mean(0)
    found = update(J, AlignedMTL(scale_mode=mode).weights(gram(J), EPS))
    assert_in_all((found - torch.stack(lengths) * directions).norm(dim=0) <= 1e-7 * torch.stack(lengths), kinds)


def test_aligned_mtl_without_gradients_is_the_mean():
    assert (AlignedMTL().weights(gram(family("all zero", 4)), EPS) == 0.25).all()


def test_aligned_mtl_refuses_an_unknown_scale():
    with pytest.raises(UserError, match="scale_mode is 'max'; valid: min, median, rmse"):
        AlignedMTL(scale_mode="max")


# ---- Nash-MTL


@up_to_8
def test_nash_makes_all_domains_gain_equally(D):
    kinds = ("random", "graded", "nearly identical", "orthogonal")
    M = unit(families(D, kinds))
    a = NashMTL().weights(M, EPS)
    gains = a * product(M / M.square().sum((0, 1)).sqrt(), a)
    assert_in_all(a > 0, kinds)
    assert_in_all((gains - 1).abs() <= 1e-9, kinds)


@pytest.mark.parametrize("D", [*range(2, 7), 8])
@pytest.mark.parametrize(("eps", "rounding"), [(1e-6, 1e-8), (1e-12, 1e-2)])
def test_nash_solves_its_regularised_problem(D, eps, rounding):
    """b (Q b) = 1 in every family without a zero row; rounding of 1e-16 is multiplied by weights squared, 1 / eps."""
    kinds = tuple(kind for kind in KINDS if kind not in ("zero row", "all zero", "one row"))
    M = unit(families(D, kinds))
    lengths = lengths_of(M)
    C = M / lengths / lengths[:, None]
    C, factor = C / C.norm(dim=(0, 1)), (M.norm(dim=(0, 1)) / C.norm(dim=(0, 1))).sqrt()
    b = NashMTL().weights(M, eps) * lengths / factor
    gains = b * ((1 - eps) * product(C, b) + eps * b)
    assert_in_all(b > 0, kinds)
    assert_in_all(b.square().sum(0) <= 1.01 * D / eps, kinds)
    assert_in_all((gains - 1).abs() <= rounding, kinds)


def test_nash_leaves_out_domains_without_a_gradient():
    J = family("zero row", 4)
    w = NashMTL().weights(gram(J), EPS)
    assert (w[0] == 0).all()
    assert torch.allclose(w[1:], NashMTL().weights(gram(J[1:]), EPS), rtol=1e-9)


def test_nash_does_not_depend_on_the_lengths_but_for_one_factor():
    J = draw(4)
    longer = J * torch.logspace(-9, 3, 4, dtype=J.dtype)[:, None, None]
    directions = [torch.nn.functional.normalize(update(g, NashMTL().weights(gram(g), EPS)), dim=0) for g in (J, longer)]
    assert torch.allclose(*directions, atol=1e-9)


@pytest.mark.parametrize("D", range(2, 7))
@pytest.mark.parametrize(("eps", "size"), [(1e-6, 1e-2), (1e-12, 1e-5)])
def test_nash_stands_still_where_the_hull_holds_zero(D, eps, size):
    J = family("hull holds zero", D)
    d = update(J, NashMTL().weights(gram(J), eps))
    assert (d.norm(dim=0) <= size * J.square().sum((0, 1)).sqrt()).all()


@pytest.mark.parametrize(("eps", "size"), [(1e-6, 1e-2), (1e-12, 1e-5)])
def test_nash_serves_the_others_where_two_domains_are_opposite(eps, size):
    """An opposite pair cannot both gain; a third domain does, by what is orthogonal to the pair."""
    J = torch.eye(3, P, dtype=torch.float64)
    J[1], J[2, 0] = -J[0], 1
    d = update(J[..., None], NashMTL().weights(gram(J[..., None]), eps)).squeeze(-1)
    assert d[0].abs() <= size
    assert d[2] > 0.1


# ---- small matrices


@pytest.mark.parametrize("n", range(1, 9))
def test_solve_equals_linalg(n):
    A, b = gram(draw(n)), draw(n)[:, :3]
    expected = torch.linalg.solve(A.permute(2, 0, 1), b.permute(2, 0, 1)).permute(1, 2, 0)
    assert torch.allclose(small.solve(A[:, :, None], b, EPS), expected, rtol=1e-9)
    assert torch.allclose(small.solve(A, b[:, 0], EPS), expected[:, 0], rtol=1e-9)


@pytest.mark.parametrize("n", range(2, 7))
def test_solve_leaves_out_what_depends_on_rows_before_and_what_is_masked(n):
    J = draw(n)
    J[1] = 2 * J[0]
    b = gram(J)[:, 0]  # in the range
    x = small.solve(gram(J), b, EPS)
    assert (x[1] == 0).all()
    assert torch.allclose(product(gram(J), x), b, rtol=1e-9)
    mask = torch.arange(n)[:, None] != 0
    rest = small.solve(small.within(mask, gram(J)), b, EPS)
    assert (rest[0] == 0).all()
    assert torch.allclose(rest[1:], small.solve(gram(J[1:]), b[1:], EPS), rtol=1e-9)


def test_solve_measures_a_pivot_against_what_stood_there():
    J = torch.tensor([[1.0, 0, 0], [0, 1e-4, 0], [1, 0, 1e-4]], dtype=torch.float64)
    assert small.solve(J @ J.T, J @ J.T @ torch.ones(3, dtype=J.dtype), 1e-6).tolist() == pytest.approx([2, 1, 0])
    assert small.solve(J @ J.T, J @ J.T @ torch.ones(3, dtype=J.dtype), 1e-9).tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("D", [*range(1, 9), 12])
def test_eigh_equals_linalg(D):
    M = unit(families(D))
    values, vectors = small.eigh(M)
    expected = torch.linalg.eigvalsh(M.permute(2, 0, 1)).t()
    assert_in_all((values.sort(0).values - expected).abs() <= 1e-14)
    assert_in_all((torch.einsum("iak,ak,jak->ijk", vectors, values, vectors) - M).abs() <= 2e-14)
    eye = torch.eye(D, dtype=M.dtype)[..., None]
    assert_in_all((torch.einsum("iak,ibk->abk", vectors, vectors) - eye).abs() <= 2e-14)


@pytest.mark.parametrize("D", range(2, 9))
def test_eigh_of_multiple_eigenvalues(D):
    """Rotations among equal eigenvalues must not undo the others: the hard case of cyclic Jacobi."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(1000, D, D, generator=generator, dtype=torch.float64))[0]
    expected = torch.randint(0, 3, (1000, 1, D), generator=generator).double()
    M = (Q * expected @ Q.mT).permute(1, 2, 0)
    values, V = small.eigh(M)
    left = torch.einsum("iak,ijk,jbk->abk", V, M, V) - torch.diag_embed(values.t(), dim1=0, dim2=1)
    assert left.abs().max() <= 1e-13


@pytest.mark.parametrize("short", [1e-3, 1e-6, 1e-8])
@pytest.mark.parametrize("cosine", [-0.9, 0.4])
def test_eigenvalues_of_short_gradients_have_all_digits(short, cosine):
    """Two short gradients orthogonal to a long one: eigenvalues far below the rounding error of the largest."""
    M = torch.eye(3, dtype=torch.float64)
    M[1:, 1:] = short**2 * torch.tensor([[1, cosine], [cosine, 1]], dtype=M.dtype)
    values, _ = small.eigh(M[..., None])
    expected = sorted([1.0, short**2 * (1 - cosine), short**2 * (1 + cosine)])
    assert values.flatten().sort().values.tolist() == pytest.approx(expected, rel=1e-14, abs=0)


def test_what_exceeds_rounding_is_measured_by_the_gradients_it_is_made_of():
    """Of the gradients of lengths 1 and 1e-5, sums of length 1e-5: cancelled from long ones, or a short one itself."""
    M = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1e-10]], dtype=torch.float64)[..., None]
    c = torch.tensor([[1.0, 1, 0], [0, 0, 1]], dtype=M.dtype).t()[..., None]  # [D, 2, 1]
    square = torch.full((2, 1), 1e-10, dtype=M.dtype)
    assert small.exceeds_rounding(square, c, M, 1e-6).flatten().tolist() == [False, True]


@pytest.mark.parametrize("n", range(1, 6))
def test_subsets_are_all_subsets(n):
    columns = small.subsets(n, torch.device("cpu")).squeeze(-1)
    assert {tuple(column) for column in columns.t().tolist()} == set(itertools.product([False, True], repeat=n))
    assert not columns[:, 0].any()
