"""The element-wise rules against loops over elements, their invariants, and the statistics of the random ones."""

from __future__ import annotations

import inspect
import math
import statistics
from fractions import Fraction
from itertools import product

import pytest
import torch
from helpers import REPOSITORY
from omegaconf import OmegaConf

from gsdg.errors import UserError
from gsdg.surgery.rules.agr_rand import AgrRand
from gsdg.surgery.rules.agr_sum import AgrSum
from gsdg.surgery.rules.and_mask import AndMask
from gsdg.surgery.rules.graddrop import GradDrop
from gsdg.surgery.rules.sand_mask import SandMask

CLASSES = {"agr_sum": AgrSum, "agr_rand": AgrRand, "and_mask": AndMask, "sand_mask": SandMask, "graddrop": GradDrop}
RULES = {name: rule() for name, rule in CLASSES.items()}
DETERMINISTIC = ["agr_sum", "and_mask", "sand_mask"]
MASKED = ["and_mask", "sand_mask"]
DOMAINS = range(1, 7)

every_rule = pytest.mark.parametrize("name", RULES)
deterministic_rule = pytest.mark.parametrize("name", DETERMINISTIC)


def draw(n_domains: int, n: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_domains, n, generator=generator, dtype=torch.float64).to(dtype)


def all_signs(n_domains: int, dtype=torch.float64) -> torch.Tensor:
    """[D, 3^D]: every pattern of minus, zero and plus, of random sizes."""
    signs = torch.tensor(list(product((-1, 0, 1), repeat=n_domains))).t()
    return (draw(n_domains, signs.shape[1]).abs() * signs).to(dtype)


def seeded(rule, rows, seed: int = 0):
    torch.manual_seed(seed)
    return combined(rule, rows)


def combined(rule, rows):
    """What `rule` makes of these rows if they are all there is."""
    rule.start_step(len(rows))
    rule.look(rows)
    return rule.combine(rows)


def rescaled(update, mask):
    """What the caller makes of the two."""
    return update if mask is None else update / (mask.mean() + 1e-10)


def columns(rows):
    return rows.double().t().tolist()


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def agrees(column) -> bool:
    return abs(sum(map(sign, column))) == len(column)


def excess(column, tau: float) -> Fraction:
    """|mean sign| - tau, exactly."""
    return Fraction(abs(sum(map(sign, column))), len(column)) - Fraction(tau).limit_denominator(1000)


# Slow forms: one column of D Python numbers at a time.


@pytest.mark.parametrize("n_domains", DOMAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_agr_sum_equals_loops(n_domains, dtype, reduction):
    rows = all_signs(n_domains, dtype)
    update, mask = combined(AgrSum(reduction=reduction), rows)
    divisor = n_domains if reduction == "mean" else 1
    expected = [sum(c) / divisor if agrees(c) else 0.0 for c in columns(rows)]
    assert mask is None
    torch.testing.assert_close(update, torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize("n_domains", DOMAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0, 0.25, 1 / 3, 0.4, 0.5, 0.6, 2 / 3, 0.75, 0.8, 5 / 6, 1])
def test_and_mask_equals_loops(n_domains, dtype, tau):
    rows = all_signs(n_domains, dtype)
    update, mask = combined(AndMask(tau=tau), rows)
    expected = [float(excess(c, tau) >= 0 or not any(c)) for c in columns(rows)]
    assert mask.tolist() == expected
    torch.testing.assert_close(update, mask * rows.mean(0))


@pytest.mark.parametrize("n_domains", DOMAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0, 0.25, 1 / 3, 0.4, 0.5, 2 / 3, 0.9])
@pytest.mark.parametrize("k", [1e-3, 0.2, 10, 1e5])
def test_sand_mask_equals_loops(n_domains, dtype, tau, k):
    def soft(column):
        variance = statistics.variance(column) if len(column) > 1 else 0.0
        return math.tanh(k * max(0.0, float(excess(column, tau))) / variance) if variance else 1.0

    rows = all_signs(n_domains, dtype)
    update, mask = combined(SandMask(tau=tau, k=k), rows)
    torch.testing.assert_close(mask, torch.tensor([soft(c) for c in columns(rows)], dtype=dtype))
    torch.testing.assert_close(update, mask * rows.mean(0))


@pytest.mark.parametrize("n_domains", DOMAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leak", [0, 0.3, 1])
def test_graddrop_equals_loops(n_domains, dtype, leak):
    """Domain by domain, with the uniform draw that the seed gives: one an element."""

    def drop(column, u):
        size = sum(map(abs, column))
        purity = (1 + sum(column) / size) / 2 if size else 0.5
        kept = [(g > 0 and purity > u) or (g < 0 and purity < u) for g in column]
        return sum((leak + (1 - leak) * keep) * g for g, keep in zip(column, kept, strict=True))

    rows = all_signs(n_domains, dtype)
    update, mask = seeded(GradDrop(leak=leak), rows)
    torch.manual_seed(0)
    uniform = torch.rand(rows.shape[1], dtype=dtype).tolist()
    expected = [drop(c, u) for c, u in zip(columns(rows), uniform, strict=True)]
    assert mask is None
    torch.testing.assert_close(update, torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize("n_domains", DOMAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scale", "reduction"), [(1, "sum"), (0.25, "sum"), (1, "mean"), (0, "sum")])
def test_agr_rand_equals_loops(n_domains, dtype, scale, reduction):
    """With the normal numbers that the seed gives: one an element."""
    rows = all_signs(n_domains, dtype)
    update, mask = seeded(AgrRand(scale=scale, reduction=reduction), rows)
    torch.manual_seed(0)
    normal = torch.randn(rows.shape[1], dtype=dtype).tolist()
    divisor = n_domains if reduction == "mean" else 1
    sigma = scale * statistics.mean(abs(sum(c)) / divisor for c in columns(rows) if agrees(c))
    expected = [
        sum(c) / divisor if agrees(c) else sigma * z * any(c) for c, z in zip(columns(rows), normal, strict=True)
    ]
    assert mask is None
    torch.testing.assert_close(update, torch.tensor(expected, dtype=dtype))


# Ties and single points of the definitions.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("tau", "passes"), [(0.3333, True), (1 / 3, True), (0.333333, True), (0.333334, True), (0.34, False)]
)
def test_and_mask_at_a_tie_of_three(dtype, tau, passes):
    rows = torch.tensor([[1.0], [2.0], [-1.5]], dtype=dtype)  # one vote of three
    assert combined(AndMask(tau=tau), rows)[1].tolist() == [passes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1 / 3, 0.3333333])
def test_sand_mask_is_shut_at_a_tie_of_small_gradients(dtype, tau):
    rows = 1e-8 * torch.tensor([[1.0], [2.0], [-1.5]], dtype=dtype)
    assert combined(SandMask(tau=tau), rows)[1].tolist() == [0]
    assert combined(SandMask(tau=tau - 0.01), rows)[1].tolist() == [1]


def test_sand_mask_prefers_equal_sizes():
    rows = torch.tensor([[1.0, 1.0, 1.0], [1.1, 3.0, 9.0], [0.9, 5.0, 27.0]])
    mask = combined(SandMask(k=1), rows)[1]
    assert 1 >= mask[0] > mask[1] > mask[2] > 0


@pytest.mark.parametrize("scale", [1e-6, 3.0, 1e6])
def test_sand_mask_of_scaled_gradients_is_that_of_a_scaled_k(scale):
    rows = all_signs(3)
    expected = combined(SandMask(k=2.0), rows)[1]
    torch.testing.assert_close(combined(SandMask(k=2.0 * scale**2), scale * rows)[1], expected)
    assert ((expected > 0.01) & (expected < 0.99)).any()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_graddrop_keeps_unanimous_elements_at_both_ends_of_the_draw(uniform, monkeypatch):
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, uniform))
    size = draw(3, 999, torch.float32).abs()
    for rows in (size, -size, 1e-44 * size, -1e-44 * size):
        torch.testing.assert_close(combined(GradDrop(), rows)[0], rows.sum(0), rtol=1e-6, atol=0)


def test_agr_rand_without_any_agreement_is_zero():
    rows = torch.tensor([[1.0, -2.0, 0.0], [-1.0, 3.0, 5.0]])
    assert combined(AgrRand(), rows)[0].tolist() == [0, 0, 0]


def test_agr_rand_of_huge_float32_gradients_is_finite():
    """A sum over the elements would be 1e39, beyond float32."""
    rows = 1e36 * draw(2, 1001, torch.float32)
    assert combined(AgrRand(), rows)[0].isfinite().all()


# Statistics of the random rules; fixed seeds, five standard errors.

N = 20_001


def test_agr_rand_noise_is_normal_with_the_mean_kept_size():
    rows = draw(2, N)
    agree = torch.tensor([agrees(c) for c in columns(rows)])
    sigma = rows.sum(0)[agree].abs().mean()
    noise = seeded(AgrRand(scale=0.5), rows)[0][~agree] / (0.5 * sigma)
    n = len(noise)
    assert n > N / 3
    assert noise.mean().abs() < 5 / math.sqrt(n)
    assert (noise.square().mean() - 1).abs() < 5 * math.sqrt(2 / n)
    assert (noise.pow(4).mean() - 3).abs() < 5 * math.sqrt(96 / n)
    assert (noise[1:] * noise[:-1]).mean().abs() < 5 / math.sqrt(n)


def test_graddrop_keeps_each_sign_by_its_share_and_the_sum_on_average():
    column = torch.tensor([3.0, 1.0, -1.0, -0.5, 0.0], dtype=torch.float64)
    rows = column[:, None].expand(5, N)
    update = seeded(GradDrop(), rows)[0]
    kept = update > 0
    share = 4 / 5.5
    error = math.sqrt(share * (1 - share) / N)
    torch.testing.assert_close(update, torch.where(kept, 4.0, -1.5).double())
    assert abs(kept.double().mean() - share) < 5 * error
    assert abs(update.mean() - column.sum()) < 5 * 5.5 * error
    both = (kept[1:] & kept[:-1]).double().mean()  # neighbouring elements are drawn independently
    assert abs(both - share**2) < 0.02


@pytest.mark.parametrize("name", ["agr_rand", "graddrop"])
def test_random_rules_follow_the_default_generator(name):
    rows = draw(3, 101)
    first = seeded(RULES[name], rows)[0]
    assert not torch.equal(combined(RULES[name], rows)[0], first)
    assert torch.equal(seeded(RULES[name], rows)[0], first)


# Invariants.


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("n_domains", DOMAINS)
def test_degenerate_gradients_give_finite_updates(name, dtype, scale, n_domains):
    rows = draw(n_domains, 7, dtype)
    one_zero = rows.clone()
    one_zero[0] = 0
    last = torch.cat((rows[:-1], -rows[:1]))  # an opposite pair; for D = 1 the opposite of one
    families = [rows, one_zero, torch.zeros_like(rows), rows[:1].expand_as(rows), last, rows[:, :1], rows[:, :0]]
    for family in [*families, all_signs(n_domains, dtype)]:
        update, mask = combined(RULES[name], scale * family)
        assert update.shape == family.shape[1:]
        assert update.dtype == dtype
        assert update.isfinite().all()
        assert (update.abs() <= 1e3 * scale).all()
        assert (mask is not None) == (name in MASKED)
        if mask is not None:
            assert mask.shape == update.shape
            assert mask.dtype == dtype
            assert ((mask >= 0) & (mask <= 1)).all()


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("n_domains", DOMAINS)
@pytest.mark.parametrize("n", [1, 101])
def test_identical_gradients_are_kept(name, dtype, scale, n_domains, n):
    """Zeros among them too, and after the rescale of the tensor; D = 1: the update is g_1, to the bit."""
    gradient = scale * draw(1, n, dtype)
    gradient[:, 5:20] = 0
    update, mask = combined(RULES[name], gradient.expand(n_domains, n))
    assert mask is None or mask.tolist() == [1] * n
    reduced = n_domains * gradient[0] if RULES[name].reduction == "sum" else gradient[0]
    torch.testing.assert_close(rescaled(update, mask), reduced, rtol=1e-6, atol=0)
    if n_domains == 1:
        assert torch.equal(update, gradient[0])


def test_no_conflict_gives_the_reduction_that_the_rule_names():
    rows = draw(3, 101).abs()
    for name, rule in RULES.items():
        assert rule.reduction == ("mean" if name in MASKED else "sum")
        if name != "sand_mask":
            torch.testing.assert_close(combined(rule, rows)[0], getattr(rows, rule.reduction)(0))
    assert AgrSum(reduction="mean").reduction == AgrRand(reduction="mean").reduction == "mean"


@pytest.mark.parametrize("name", ["agr_sum", "agr_rand", "and_mask", "graddrop"])
@pytest.mark.parametrize("scale", [2.0**-90, 2.0**90])
def test_scaled_gradients_give_the_scaled_update(name, scale):
    """To the bit: a power of two. SAND-mask has no such property, see above."""
    rows = all_signs(3, torch.float32)
    update, mask = seeded(RULES[name], rows)
    scaled, scaled_mask = seeded(RULES[name], scale * rows)
    assert torch.equal(scaled, scale * update)
    assert mask is None or torch.equal(scaled_mask, mask)


@deterministic_rule
def test_negated_gradients_give_the_negated_update(name):
    rows = all_signs(4)
    torch.testing.assert_close(combined(RULES[name], -rows)[0], -combined(RULES[name], rows)[0])


@every_rule
def test_the_order_of_domains_does_not_matter(name):
    """With the same random numbers, where there are any."""
    rows = all_signs(4)
    update, mask = seeded(RULES[name], rows)
    again, mask_again = seeded(RULES[name], rows[[2, 0, 3, 1]])
    torch.testing.assert_close(again, update)
    torch.testing.assert_close(mask_again, mask)


@deterministic_rule
def test_elements_do_not_depend_on_each_other(name):
    rows = all_signs(4)
    order = torch.randperm(81, generator=torch.Generator().manual_seed(0))
    whole = combined(RULES[name], rows)
    for i, part in enumerate(order.split(10)):
        for values, expected in zip(combined(RULES[name], rows[:, part]), whole, strict=True):
            assert values is expected is None or torch.equal(values, expected[part]), i


@every_rule
def test_strided_rows_are_left_as_they_are(name):
    """A slice of the flat axis is a view; the caller's gradients must survive."""
    whole = draw(4, 200, torch.float32)
    before = whole.clone()
    view = whole[:, 13:114]
    torch.testing.assert_close(seeded(RULES[name], view)[0], seeded(RULES[name], view.contiguous())[0])
    assert torch.equal(whole, before)


@every_rule
@pytest.mark.parametrize("n_domains", DOMAINS)
def test_nothing_is_looked_at_on_the_host(name, n_domains):
    rows = torch.empty(n_domains, 5, device="meta")
    update, mask = combined(RULES[name], rows)
    assert update.device.type == "meta"
    assert update.shape == (5,)
    assert mask is None or mask.shape == (5,)


# Constructors and configs.


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *product(["agr_sum", "agr_rand"], ["reduction"], ["average", None, 1]),
        *product(["agr_rand"], ["scale"], [-0.1, math.inf, math.nan, "1", True, None]),
        *product(["and_mask"], ["tau"], [-0.1, 1.1, math.nan, "1", True, None]),
        *product(["sand_mask"], ["tau"], [-0.1, 1, 1.0, 0.9999999, 1.1, math.nan, "0.5", False, None]),
        *product(["sand_mask"], ["k"], [0, -1, math.inf, math.nan, "10", True, None]),
        *product(["graddrop"], ["leak"], [-0.1, 1.1, math.nan, "0", True, None]),
    ],
)
def test_a_wrong_option_is_refused_by_name_and_value(name, option, value):
    with pytest.raises(UserError) as error:
        CLASSES[name](**{option: value})
    assert str(error.value).startswith(f"{option} is {value!r}")


def test_sand_mask_says_why_tau_is_not_1():
    with pytest.raises(UserError, match="every mask is 0 and nothing trains: choose a smaller one"):
        SandMask(tau=1.0)


@every_rule
def test_options_are_named(name):
    with pytest.raises(TypeError):
        CLASSES[name](0.5)


@every_rule
def test_configs_hold_every_option_at_its_default(name):
    folder = REPOSITORY / "conf" / "algorithm"
    rule = OmegaConf.load(folder / "rule" / f"{name}.yaml")
    assert rule.pop("name") == name
    assert rule.pop("_target_") == f"gsdg.surgery.rules.{CLASSES[name].__name__}"
    options = inspect.signature(CLASSES[name]).parameters.values()
    assert dict(rule) == {option.name: option.default for option in options}
