"""The element-wise rules against loops over elements, and their invariants."""

from __future__ import annotations

import inspect
import math
import re
import statistics
from collections.abc import Iterator
from fractions import Fraction
from itertools import product

import pytest
import torch
from families import ELEMENT_RULES, normal
from helpers import REPOSITORY, in_case
from omegaconf import OmegaConf
from torch import Tensor

from gsdg.surgery import AgrRand, AgrSum, AndMask, GradDrop, SandMask
from gsdg.surgery.rules import ElementRule
from gsdg.utils.errors import UserError

DOMAINS = range(1, 7)
DTYPES = (torch.float32, torch.float64)

every_rule = pytest.mark.parametrize("name", ELEMENT_RULES)


def all_signs(n_domains: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[D, 3^D]: every pattern of minus, zero and plus, with random absolute values."""
    signs = torch.tensor(list(product((-1, 0, 1), repeat=n_domains))).t()
    return (normal(*signs.shape).abs() * signs).to(dtype)


def combined(rule: ElementRule, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """The update and mask of `rule` if these rows are the whole model, with random draws from seed 0."""
    torch.manual_seed(0)
    rule.start_step(len(rows))
    rule.first_pass(rows)
    return rule.combine(rows)


# Slow reference implementations: one column of D Python numbers at a time.


def columns(rows: Tensor) -> list[list[float]]:
    return rows.double().t().tolist()


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def agrees(column: list[float]) -> bool:
    return abs(sum(map(sign, column))) == len(column)


def excess(column: list[float], tau: float) -> Fraction:
    """|mean sign| - tau, exactly."""
    return Fraction(abs(sum(map(sign, column))), len(column)) - Fraction(tau).limit_denominator(1000)


def rows_with_all_signs() -> Iterator[Tensor]:
    for D, dtype in product(DOMAINS, DTYPES):
        yield all_signs(D, dtype)


def assert_unmasked(rule: ElementRule, rows: Tensor, expected: list[float]) -> None:
    with in_case(rule=vars(rule), D=len(rows), dtype=rows.dtype):
        update, mask = combined(rule, rows)
        assert mask is None
        torch.testing.assert_close(update, torch.tensor(expected, dtype=rows.dtype))


def assert_masked(rule: ElementRule, rows: Tensor, expected: list[float]) -> None:
    with in_case(rule=vars(rule), D=len(rows), dtype=rows.dtype):
        update, mask = combined(rule, rows)
        torch.testing.assert_close(mask, torch.tensor(expected, dtype=rows.dtype))
        torch.testing.assert_close(update, mask * rows.mean(0))
        if isinstance(rule, AndMask):
            assert mask.tolist() == expected


def test_agr_sum_equals_loops():
    for rows, reduction in product(rows_with_all_signs(), ("sum", "mean")):
        rule = AgrSum(reduction=reduction)
        divisor = len(rows) if reduction == "mean" else 1
        assert_unmasked(rule, rows, [sum(c) / divisor if agrees(c) else 0.0 for c in columns(rows)])
        assert rule.reduction == reduction


def test_and_mask_equals_loops():
    for rows, tau in product(rows_with_all_signs(), (0, 0.25, 1 / 3, 0.4, 0.5, 0.6, 2 / 3, 0.75, 0.8, 5 / 6, 1)):
        assert_masked(AndMask(tau=tau), rows, [float(excess(c, tau) >= 0 or not any(c)) for c in columns(rows)])


def test_sand_mask_equals_loops():
    for rows in rows_with_all_signs():
        variances = [statistics.variance(c) if len(c) > 1 else 0.0 for c in columns(rows)]
        for tau in (0, 0.25, 1 / 3, 0.4, 0.5, 2 / 3, 0.9):
            margins = [max(0.0, float(excess(c, tau))) for c in columns(rows)]
            for k in (1e-3, 0.2, 10, 1e5):
                soft = [math.tanh(k * m / v) if v else 1.0 for m, v in zip(margins, variances, strict=True)]
                assert_masked(SandMask(tau=tau, k=k), rows, soft)


def test_graddrop_equals_loops():
    """Domain by domain, with the uniform numbers of the seed: one per element."""

    def drop(column: list[float], u: float, leak: float) -> float:
        size = sum(map(abs, column))
        purity = (1 + sum(column) / size) / 2 if size else 0.5
        kept = [(g > 0 and purity > u) or (g < 0 and purity < u) for g in column]
        return sum((leak + (1 - leak) * keep) * g for g, keep in zip(column, kept, strict=True))

    for rows, leak in product(rows_with_all_signs(), (0, 0.3, 1)):
        torch.manual_seed(0)
        uniform = torch.rand(rows.shape[1], dtype=rows.dtype).tolist()
        expected = [drop(c, u, leak) for c, u in zip(columns(rows), uniform, strict=True)]
        assert_unmasked(GradDrop(leak=leak), rows, expected)


def test_agr_rand_equals_loops():
    """With the normal numbers of the seed: one per element."""
    for rows, (scale, reduction) in product(
        rows_with_all_signs(), ((1, "sum"), (0.25, "sum"), (1, "mean"), (0, "sum"))
    ):
        torch.manual_seed(0)
        noise = torch.randn(rows.shape[1], dtype=rows.dtype).tolist()
        divisor = len(rows) if reduction == "mean" else 1
        sums = [sum(c) / divisor for c in columns(rows)]
        sigma = scale * statistics.mean(abs(s) for s, c in zip(sums, columns(rows), strict=True) if agrees(c))
        elements = zip(columns(rows), sums, noise, strict=True)
        rule = AgrRand(scale=scale, reduction=reduction)
        assert_unmasked(rule, rows, [s if agrees(c) else sigma * z * any(c) for c, s, z in elements])
        assert rule.reduction == reduction


# Ties and single points of the definitions.


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_vote_of_three_is_a_tie_at_tau_one_third(dtype):
    rows = torch.tensor([[1.0], [2.0], [-1.5]], dtype=dtype)
    for tau, passes in [(0.3333, 1), (1 / 3, 1), (0.333333, 1), (0.333334, 1), (0.34, 0)]:
        assert combined(AndMask(tau=tau), rows)[1].tolist() == [passes], tau
    for tau in (1 / 3, 0.3333333):  # small gradients, at which a margin of rounding errors would open the soft mask
        assert combined(SandMask(tau=tau), 1e-8 * rows)[1].tolist() == [0], tau
        assert combined(SandMask(tau=tau - 0.01), 1e-8 * rows)[1].tolist() == [1], tau


def test_sand_mask_of_scaled_gradients_is_that_of_a_scaled_k():
    rows = all_signs(3)
    expected = combined(SandMask(k=2.0), rows)[1]
    assert ((expected > 0.01) & (expected < 0.99)).any()
    for scale in (1e-6, 3.0, 1e6):
        torch.testing.assert_close(combined(SandMask(k=2.0 * scale**2), scale * rows)[1], expected)


def test_graddrop_keeps_unanimous_elements_at_both_ends_of_the_draw(monkeypatch):
    size = normal(3, 999).float().abs()
    for uniform in (0.0, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand_like", lambda x, uniform=uniform: torch.full_like(x, uniform))
        for rows in (size, -size, 1e-44 * size, -1e-44 * size):
            torch.testing.assert_close(combined(GradDrop(), rows)[0], rows.sum(0), rtol=1e-6, atol=0)


def test_agr_rand_is_zero_without_any_agreement_and_finite_for_huge_gradients():
    """Huge: a sum over the elements would be 1e39, beyond float32."""
    rows = torch.tensor([[1.0, -2.0, 0.0], [-1.0, 3.0, 5.0]])
    assert combined(AgrRand(), rows)[0].tolist() == [0, 0, 0]
    assert combined(AgrRand(), 1e36 * normal(2, 1001).float())[0].isfinite().all()


# Invariants.


@every_rule
def test_scaled_gradients_give_the_scaled_update(name):
    """By a power of two: to the bit. SAND-mask has no such property, but stays finite."""
    rule, rows = ELEMENT_RULES[name](), all_signs(4, torch.float32)
    update, mask = combined(rule, rows)
    for scale in (2.0**-100, 2.0**100):
        scaled, scaled_mask = combined(rule, scale * rows)
        if name == "sand_mask":
            assert scaled.isfinite().all()
            assert ((scaled_mask >= 0) & (scaled_mask <= 1)).all()
        else:
            assert torch.equal(scaled, scale * update)
            assert mask is None or torch.equal(scaled_mask, mask)


@every_rule
def test_identical_gradients_are_kept(name):
    """With zeros among them, and after the rescaling of the tensor; D = 1: the update is g_1 to the bit."""
    rule = ELEMENT_RULES[name]()
    for D, dtype, scale, n in product(DOMAINS, DTYPES, (1e-30, 1.0, 1e30), (1, 101)):
        gradient = scale * normal(1, n).to(dtype)
        gradient[:, 5:20] = 0
        update, mask = combined(rule, gradient.expand(D, n))
        reduced = D * gradient[0] if rule.reduction == "sum" else gradient[0]
        with in_case(D=D, dtype=dtype, scale=scale, n=n):
            assert mask is None or mask.tolist() == [1] * n
            torch.testing.assert_close(update, reduced, rtol=1e-6, atol=0)
            assert D > 1 or torch.equal(update, gradient[0])


@every_rule
def test_strided_gradients_and_no_elements_are_no_special_cases(name):
    """The rows are views of G, which a rule must not change."""
    rule, rows = ELEMENT_RULES[name](), all_signs(4, torch.float32)
    whole = torch.cat((rows, rows, rows), dim=1)
    before = whole.clone()
    torch.testing.assert_close(combined(rule, whole[:, 81:162])[0], combined(rule, rows)[0])
    assert torch.equal(whole, before)
    assert combined(rule, rows[:, :0])[0].shape == (0,)


# Constructors and configs.


def test_a_wrong_option_is_refused_by_name_and_value():
    no_numbers = (math.nan, "1", False, True, None)
    for name, option, values in [
        ("agr_sum", "reduction", ("average", None, 1)),
        ("agr_rand", "reduction", ("average", None, 1)),
        ("agr_rand", "scale", (-0.1, math.inf, *no_numbers)),
        ("and_mask", "tau", (-0.1, 1.1, *no_numbers)),
        ("sand_mask", "tau", (-0.1, 1, 1.0, 0.9999999, 1.1, *no_numbers)),
        ("sand_mask", "k", (0, -1, math.inf, *no_numbers)),
        ("graddrop", "leak", (-0.1, 1.1, *no_numbers)),
    ]:
        for value in values:
            with in_case(rule=name), pytest.raises(UserError, match=rf"^{option} is {re.escape(repr(value))}"):
                ELEMENT_RULES[name](**{option: value})
    with pytest.raises(UserError, match="every mask is 0 and nothing trains: choose a smaller value"):
        SandMask(tau=1.0)


@every_rule
def test_options_are_named_and_configs_hold_every_option_at_its_default(name):
    rule = ELEMENT_RULES[name]
    with pytest.raises(TypeError):
        rule(0.5)
    config = OmegaConf.load(REPOSITORY / "conf" / "algorithm" / "rule" / f"{name}.yaml")
    assert config.pop("name") == name
    assert config.pop("_target_") == f"gsdg.surgery.rules.{rule.__name__}"
    assert dict(config) == {option.name: option.default for option in inspect.signature(rule).parameters.values()}
