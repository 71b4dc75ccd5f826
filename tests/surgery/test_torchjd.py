"""TorchJD 0.18.0 as the oracle of the native weighting rules, and as a rule itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gsdg.errors import UserError
from gsdg.surgery.rules.aligned_mtl import AlignedMTL
from gsdg.surgery.rules.base import Weighting
from gsdg.surgery.rules.cagrad import CAGrad
from gsdg.surgery.rules.dualproj import DualProj
from gsdg.surgery.rules.graddrop import GradDrop
from gsdg.surgery.rules.gradvac import GradVac
from gsdg.surgery.rules.imtl_g import IMTLG
from gsdg.surgery.rules.mgda import MGDA
from gsdg.surgery.rules.nash import NashMTL
from gsdg.surgery.rules.pcgrad import PCGrad
from gsdg.surgery.rules.torchjd import SUMS, TorchJD, _available
from gsdg.surgery.rules.upgrad import UPGrad

pytest.importorskip("torchjd")
from torchjd import aggregation
from torchjd.linalg import QuadprogProjector

pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")
EPS = 1e-12


def projector() -> QuadprogProjector:
    return QuadprogProjector(norm_eps=1e-20, reg_eps=1e-13)


def nash_oracle() -> Callable[[Tensor], Tensor]:
    aggregation.NashMTL(n_tasks=2)  # raises where its solver is not installed
    return nash


def nash(J: Tensor) -> Tensor:
    """J [D, P] -> weights [D], all 0 where its solver fails: then it answers what it began with."""
    J = J / (J @ J.T).norm().sqrt()  # it divides by that norm too, but forgets the norm in its constraints
    a = aggregation.NashMTL(n_tasks=len(J), max_norm=0.0, optim_niter=200).weighting(J)
    return a if (a * (J @ J.T @ a) - 1).norm() < 1e-3 else torch.zeros_like(a)


def imtl_g_of_directions(M: Tensor) -> Tensor:
    """TorchJD's IMTL-G of the gradients scaled to length 1, as weights of the gradients themselves."""
    lengths = M.diagonal().sqrt()
    w = aggregation.IMTLGWeighting()(M / lengths / lengths[:, None]) / lengths
    return w / w.sum() if w.any() else w


class Case(NamedTuple):
    """The tolerances are distances of updates, of gradients J with ||J|| = 1 (M of trace 1)."""

    rule: Weighting
    oracle: Callable[[], Callable[[Tensor], Tensor]]
    draws: int  # for each D and rank
    independent: float  # tolerance where the gradients are linearly independent
    dependent: float  # and of rank D - 1
    of_gradients: bool = False  # the oracle takes J, not M
    if_dependent: Callable[[], Callable[[Tensor], Tensor]] | None = None  # another oracle for rank D - 1
    interior: bool = False  # only where the hull keeps away from zero


CASES = {
    # dependent: TorchJD's least squares count a projection by its gradient's length squared, ours do not
    "imtl_g": Case(IMTLG(), aggregation.IMTLGWeighting, 200, 1e-12, 1e-8, if_dependent=lambda: imtl_g_of_directions),
    "aligned_mtl min": Case(AlignedMTL(), aggregation.AlignedMTLWeighting, 200, 1e-13, 1e-10),
    "aligned_mtl median": Case(
        AlignedMTL(scale_mode="median"), lambda: aggregation.AlignedMTLWeighting(scale_mode="median"), 200, 1e-13, 1e-10
    ),
    "aligned_mtl rmse": Case(
        AlignedMTL(scale_mode="rmse"), lambda: aggregation.AlignedMTLWeighting(scale_mode="rmse"), 200, 1e-13, 1e-10
    ),
    # dependent: the oracle's 1e-13 on the diagonal, times weights squared that reach 1e6, under a root
    "upgrad": Case(UPGrad(), lambda: aggregation.UPGradWeighting(projector=projector()), 200, 1e-10, 1e-4),
    "dualproj": Case(DualProj(), lambda: aggregation.DualProjWeighting(projector=projector()), 200, 1e-10, 1e-4),
    # Clarabel's own tolerance
    "cagrad": Case(
        CAGrad(rescale=False), lambda: aggregation.CAGradWeighting(c=0.5, norm_eps=1e-6), 25, 2e-4, 2e-4, interior=True
    ),
    # 100 Frank-Wolfe steps stop that far from the minimum: see also the test of lengths below
    "mgda": Case(MGDA(), aggregation.MGDAWeighting, 40, 3e-2, 3e-2),
    # its residual of 1e-3, at which it stops, is mostly far less
    "nash": Case(NashMTL(), nash_oracle, 8, 1e-4, 1e-4, of_gradients=True, interior=True),
}


def made(factory: Callable):
    try:
        return factory()
    except ImportError as error:
        pytest.skip(str(error))


def draw(D: int, P: int, n: int) -> Tensor:
    """[n, D, P] float64 with ||J|| = 1."""
    J = torch.randn(n, D, P, generator=torch.Generator().manual_seed(10 * D + P), dtype=torch.float64)
    return J / J.square().sum((1, 2), keepdim=True).sqrt()


def shortest(J: Tensor) -> Tensor:
    """[n, D, P] -> the lengths of the shortest vectors of the hulls [n]."""
    return torch.stack([(MGDA().weights((j @ j.T)[..., None], EPS).T @ j).norm() for j in J])


@pytest.mark.parametrize("D", range(2, 7))
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("independent", [True, False])
def test_the_update_is_torchjds(name, D, independent):
    case = CASES[name]
    oracle = made(case.oracle if independent or not case.if_dependent else case.if_dependent)
    J = draw(D, 3 * D if independent else D - 1, case.draws)
    if case.interior:
        J = J[shortest(J) > 1e-2]
    M = J @ J.mT
    found = case.rule.weights(M.permute(1, 2, 0), EPS).t()
    expected = torch.stack([oracle(x) for x in (J if case.of_gradients else M)])
    answered = expected.ne(0).any(1) if name == "nash" else torch.ones(len(J), dtype=torch.bool)
    assert answered.sum() >= case.draws // 4
    distances = torch.einsum("ni,nip->np", found - expected, J).norm(dim=1)[answered]
    assert distances.max() <= (case.independent if independent else case.dependent)


@pytest.mark.parametrize("D", range(2, 7))
def test_mgda_is_never_longer_than_torchjds(D):
    M = torch.cat([J @ J.mT for J in (draw(D, 3 * D, 20), draw(D, D - 1, 20))])
    oracle = aggregation.MGDAWeighting()
    found, other = MGDA().weights(M.permute(1, 2, 0), EPS).t(), torch.stack([oracle(m) for m in M])
    lengths = [torch.einsum("ni,nij,nj->n", w, M, w) for w in (found, other)]
    assert (lengths[0] <= lengths[1] + 1e-15).all()
    if D > 3:
        assert (lengths[0] < lengths[1] - 1e-6).any()


@pytest.mark.parametrize("D", range(2, 7))
def test_pcgrad_is_torchjds_with_the_same_draws(D):
    rule, oracle = PCGrad(), aggregation.PCGradWeighting()
    for seed, J in enumerate(draw(D, 3 * D, 200)):
        torch.manual_seed(seed)
        rule.start_step(D)
        found = rule.coefficients((J @ J.T)[..., None], EPS)[0].sum(0).squeeze(-1)
        torch.manual_seed(seed)
        assert ((found - oracle(J @ J.T)) @ J).norm() <= 1e-13


def test_gradvac_of_two_domains_is_torchjds_over_many_steps():
    """Of more, TorchJD draws its orders in another way: test_gradvac.py has the paper's loop."""
    rule, oracle = GradVac(beta=0.3), aggregation.GradVacWeighting(beta=0.3, eps=0.0)
    for J in draw(2, 6, 200):
        rule.start_step(2)
        found = rule.coefficients((J @ J.T)[..., None], EPS)[0].sum(0).squeeze(-1)
        assert ((found - oracle(J @ J.T)) @ J).norm() <= 1e-12


@pytest.mark.parametrize("D", range(2, 7))
def test_graddrop_is_torchjds_with_the_same_draws(D):
    for seed, J in enumerate(draw(D, 50, 40)):
        torch.manual_seed(seed)
        found, _ = GradDrop().combine(J)
        torch.manual_seed(seed)
        assert (found - aggregation.GradDrop()(J)).norm() <= 1e-13


# ---- TorchJD as a rule


def grams(D: int = 3, K: int = 5) -> Tensor:
    return (draw(D, 7, K) @ draw(D, 7, K).mT).permute(1, 2, 0)


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_every_part_has_torchjds_weights_of_its_matrix_over_its_trace(scale):
    rule = TorchJD(weighting="MGDAWeighting", options={"epsilon": 1e-2, "max_iters": 3})
    weights = rule.weights(grams() * scale, EPS)
    oracle = aggregation.MGDAWeighting(epsilon=1e-2, max_iters=3)
    expected = torch.stack([oracle(M / M.trace()) for M in grams().unbind(-1)], dim=-1)
    torch.testing.assert_close(weights, expected)
    assert (weights - aggregation.MGDAWeighting(max_iters=1)(grams()[..., 0])[:, None]).abs().max() > 1e-2


def test_torchjd_sees_matrices_of_trace_one():
    """Its UPGrad takes a smaller trace than 1e-4 for 0."""
    rule, seen = TorchJD(weighting="MeanWeighting"), []
    rule._weighting = lambda part: seen.append(part.trace().item()) or part[0]
    rule.weights(grams() * 1e-20, EPS)
    assert seen == pytest.approx([1] * 5)


def test_torchjd_is_not_asked_about_one_domain_or_parts_without_gradient():
    rule = TorchJD(weighting="SumWeighting")
    M = grams()
    M[..., 2] = 0
    weights = rule.weights(M, EPS)
    assert (weights[:, 2] == 1 / 3).all()
    assert (weights[:, [0, 1, 3, 4]] == 1).all()
    assert rule.weights(torch.zeros(3, 3, 0, dtype=M.dtype), EPS).shape == (3, 0)
    krum = TorchJD(weighting="KrumWeighting", options={"n_byzantine": 1})
    assert (krum.weights(grams(1), EPS) == 1).all()


@pytest.mark.parametrize("name", _available())
def test_reduction_says_what_identical_gradients_give(name):
    options = {
        "CAGradWeighting": {"c": 0.0},
        "ConstantWeighting": {"weights": [0.25] * 4},
        "FairGradWeighting": {"alpha": 1.0},
        "KrumWeighting": {"n_byzantine": 1},
    }
    try:
        rule = TorchJD(weighting=name, options=options.get(name))
    except UserError as error:
        pytest.skip(str(error))
    total = rule.weights(torch.ones(4, 4, 1, dtype=torch.float64), EPS).sum().item()
    assert rule.reduction == ("sum" if name in SUMS else "mean")
    assert total == pytest.approx(4 if rule.reduction == "sum" else 1, rel=1e-3)


def test_lists_in_options_become_tensors():
    weights = TorchJD(weighting="ConstantWeighting", options={"weights": [0.2, 0.3, 0.5]}).weights(grams(), EPS)
    assert weights[:, 1].tolist() == pytest.approx([0.2, 0.3, 0.5])


def test_norm_eps_and_reg_eps_reach_the_projector():
    pytest.importorskip("quadprog")
    rule = TorchJD(weighting="DualProjWeighting", options={"reg_eps": 1e-9, "norm_eps": 0.0})
    assert (rule._weighting.projector.reg_eps, rule._weighting.projector.norm_eps) == (1e-9, 0)
    assert TorchJD()._weighting.projector.reg_eps == 1e-4


@pytest.mark.parametrize("name", ["Weighting", "GradVacWeighting", "MGDA", "upgrad"])
def test_an_unknown_weighting_is_named_with_the_valid_ones(name):
    with pytest.raises(UserError, match=f"no weighting '{name}' .*valid: AlignedMTLWeighting, .*UPGradWeighting$"):
        TorchJD(weighting=name)


@pytest.mark.parametrize(
    ("weighting", "options"),
    [
        ("MGDAWeighting", {"epsilon": -1.0}),
        ("MGDAWeighting", {"tolerance": 1.0}),
        ("KrumWeighting", None),
    ],
)
def test_wrong_options_are_refused_with_torchjds_reason(weighting, options):
    with pytest.raises(UserError, match=f"TorchJD's {weighting} refuses the options .*(epsilon|tolerance|n_byzantine)"):
        TorchJD(weighting=weighting, options=options)


def test_more_than_50_parts_are_refused():
    rule = TorchJD(weighting="MeanWeighting")
    assert rule.weights(grams(K=50), EPS).shape == (3, 50)
    with pytest.raises(UserError, match="there are 51 parts; valid: up to 50. Use partition=model, module or groups"):
        rule.weights(grams(K=51), EPS)


def test_what_is_not_installed_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr("torchjd._mixins.find_spec", lambda name: None)
    with pytest.raises(UserError, match="quadprog"):
        TorchJD()
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(UserError, match=r"pip install 'gsdg\[torchjd\]'"):
        TorchJD()
