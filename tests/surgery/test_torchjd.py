"""TorchJD 0.18.0 as the reference for the native weighting rules, and as a rule."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from families import normal
from helpers import in_case
from torch import Tensor

from gsdg.surgery import IMTLG, MGDA, AlignedMTL, CAGrad, DualProj, GradDrop, GradVac, NashMTL, PCGrad, UPGrad
from gsdg.surgery.rules import Weighting
from gsdg.surgery.rules.torchjd import SUMS, TorchJD, _available
from gsdg.utils.errors import UserError

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


class Oracle(NamedTuple):
    rule: Weighting
    make: Callable[[], Callable[[Tensor], Tensor]]
    draws: int  # for each D
    tolerance: float  # a distance of updates, of gradients J with ||J|| = 1 (M of trace 1)


ORACLES = {
    "imtl_g": Oracle(IMTLG(), aggregation.IMTLGWeighting, 200, 1e-12),
    **{
        f"aligned_mtl {mode}": Oracle(
            AlignedMTL(scale_mode=mode), partial(aggregation.AlignedMTLWeighting, scale_mode=mode), 200, 1e-13
        )
        for mode in ("min", "median", "rmse")
    },
    "upgrad": Oracle(UPGrad(), lambda: aggregation.UPGradWeighting(projector=projector()), 200, 1e-10),
    "dualproj": Oracle(DualProj(), lambda: aggregation.DualProjWeighting(projector=projector()), 200, 1e-10),
    # Clarabel's own tolerance
    "cagrad": Oracle(CAGrad(rescale=False), partial(aggregation.CAGradWeighting, c=0.5, norm_eps=1e-6), 25, 2e-4),
    # 100 Frank-Wolfe steps stop at this distance from the minimum
    "mgda": Oracle(MGDA(), aggregation.MGDAWeighting, 40, 3e-2),
    # it stops at a residual of 1e-3, which is mostly far smaller
    "nash": Oracle(NashMTL(), nash_oracle, 8, 1e-4),
}


def draw(D: int, P: int, n: int) -> Tensor:
    """[n, D, P] float64 with ||J|| = 1."""
    J = normal(n, D, P, seed=10 * D + P)
    return J / J.square().sum((1, 2), keepdim=True).sqrt()


@pytest.mark.parametrize("name", ORACLES)
def test_the_update_of_independent_gradients_is_torchjds(name):
    """For dependent gradients the rules deviate, or TorchJD's solvers do: test_weightings.py has the definitions."""
    rule, make, draws, tolerance = ORACLES[name]
    try:
        oracle = make()
    except ImportError as error:
        pytest.skip(str(error))
    for D in range(2, 7):
        J = draw(D, 3 * D, draws)
        M = J @ J.mT
        w = rule.weights(M.permute(1, 2, 0), EPS).t()
        expected = torch.stack([oracle(x) for x in (J if name == "nash" else M)])
        answered = expected.ne(0).any(1) if name == "nash" else torch.ones(draws, dtype=torch.bool)
        with in_case(D=D):
            assert answered.sum() >= draws // 4
            assert torch.einsum("ni,nip->np", w - expected, J).norm(dim=1)[answered].max() <= tolerance


def test_the_rules_with_random_draws_are_torchjds_with_the_same_draws():
    """GradVac for two domains only: for more TorchJD draws its orders differently; test_gradvac.py has the paper's."""
    for D in range(2, 7):
        for seed, J in enumerate(draw(D, 3 * D, 40)):
            rule = PCGrad()
            torch.manual_seed(seed)
            rule.start_step(D)
            w = rule.coefficients((J @ J.T)[..., None], EPS)[0].sum(0).squeeze(-1)
            torch.manual_seed(seed)
            assert ((w - aggregation.PCGradWeighting()(J @ J.T)) @ J).norm() <= 1e-13, (D, seed)
        for seed, J in enumerate(draw(D, 50, 40)):
            torch.manual_seed(seed)
            update, _ = GradDrop().combine(J)
            torch.manual_seed(seed)
            assert (update - aggregation.GradDrop()(J)).norm() <= 1e-13, (D, seed)
    rule, oracle = GradVac(beta=0.3), aggregation.GradVacWeighting(beta=0.3, eps=0.0)
    for step, J in enumerate(draw(2, 6, 200)):
        rule.start_step(2)
        w = rule.coefficients((J @ J.T)[..., None], EPS)[0].sum(0).squeeze(-1)
        assert ((w - oracle(J @ J.T)) @ J).norm() <= 1e-12, step


# ---- TorchJD as a rule


def grams(D: int = 3, K: int = 5) -> Tensor:
    return (draw(D, 7, K) @ draw(D, 7, K).mT).permute(1, 2, 0)


def test_every_part_has_torchjds_weights_of_its_matrix_over_its_trace(monkeypatch):
    """TorchJD's UPGrad treats a trace below 1e-4 as 0."""
    rule = TorchJD(weighting="MGDAWeighting", options={"epsilon": 1e-2, "max_iters": 3})
    oracle = aggregation.MGDAWeighting(epsilon=1e-2, max_iters=3)
    expected = torch.stack([oracle(M / M.trace()) for M in grams().unbind(-1)], dim=-1)
    for scale in (1.0, 1e-9, 1e9):
        weights = rule.weights(grams() * scale, EPS)
        torch.testing.assert_close(weights, expected)
        assert (weights - aggregation.MGDAWeighting(max_iters=1)(grams()[..., 0])[:, None]).abs().max() > 1e-2
    traces = []
    monkeypatch.setattr(rule, "_weighting", lambda part: traces.append(part.trace().item()) or part[0])
    rule.weights(grams() * 1e-20, EPS)
    assert traces == pytest.approx([1] * 5)


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


def test_options_reach_torchjd():
    """Lists become tensors; norm_eps and reg_eps are the projector's."""
    weights = TorchJD(weighting="ConstantWeighting", options={"weights": [0.2, 0.3, 0.5]}).weights(grams(), EPS)
    assert weights[:, 1].tolist() == pytest.approx([0.2, 0.3, 0.5])
    pytest.importorskip("quadprog")
    rule = TorchJD(weighting="DualProjWeighting", options={"reg_eps": 1e-9, "norm_eps": 0.0})
    assert (rule._weighting.projector.reg_eps, rule._weighting.projector.norm_eps) == (1e-9, 0)
    assert TorchJD()._weighting.projector.reg_eps == 1e-4


def test_what_cannot_be_used_is_refused_with_the_reason():
    for name in ("Weighting", "GradVacWeighting", "MGDA", "upgrad"):
        with pytest.raises(UserError, match=f"no weighting '{name}' .*valid: AlignedMTLWeighting, .*UPGradWeighting$"):
            TorchJD(weighting=name)
    for name, options in [
        ("MGDAWeighting", {"epsilon": -1.0}),
        ("MGDAWeighting", {"tolerance": 1.0}),
        ("KrumWeighting", None),
    ]:
        message = f"TorchJD's {name} does not accept the options .*(epsilon|tolerance|n_byzantine)"
        with in_case(options=options), pytest.raises(UserError, match=message):
            TorchJD(weighting=name, options=options)
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
