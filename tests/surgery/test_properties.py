"""The properties of the rules, tested for every rule on families of gradients.

A property is a function of the name of a rule and the dtype of the gradients that returns its worst violation, relative
to the longest gradient. For the rules in `HOLDS` it must be rounding error. For all other rules the test requires a
clear counterexample, so that the table stays up to date. The table in gsdg/surgery/rules/README.md is compared with
`HOLDS`.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from families import FAMILIES, GRAM_RULES, NAMES, RULES, SHAPES, SIZE, draw, surgery_of, update_of
from helpers import REPOSITORY, in_case

from gsdg.surgery import Chunk, NormOutliers, PerElement, PerFilter, Surgery
from gsdg.surgery.rules import AgrSum, CorGrad, GradVac, PCGrad

TOLERANCES = {
    torch.float64: 1e-7,  # rounding of float64 algebra on degenerate matrices
    torch.float32: 1e-6,  # some roundings of 6e-8 each in the products and the sum of six gradients
}
SMALLEST = 1e-30  # replaces 0 in denominators
DOMAINS = range(1, 7)
SUM_RULES = {name for name, make in RULES.items() if make().reduction == "sum"}
RANDOM_ORDER = {"pcgrad", "gradvac"}
RANDOM = RANDOM_ORDER | {"agr_rand", "graddrop"}

HOLDS = {
    "one domain": set(RULES),
    "identical": set(RULES),
    "no conflict": {
        *("mean", "sum", "pcgrad", "gradvac", "corgrad", "upgrad", "dualproj"),
        *("agr_sum", "agr_rand", "and_mask", "graddrop"),
    },
    "never against a domain": {"mgda", "upgrad", "dualproj", "agr_sum", "and_mask"},
    "any order of domains": set(RULES) - RANDOM_ORDER - {"corgrad"},
    "scale": set(RULES) - {"sand_mask"},
    "no randomness": set(RULES) - RANDOM,
}


def distance(a: torch.Tensor, b: torch.Tensor, G: torch.Tensor) -> float:
    """||a - b|| relative to the longest of the gradients."""
    return ((a - b).norm() / G.norm(dim=1).max().clamp_min(SMALLEST)).item()


def one_domain(name: str, dtype: torch.dtype) -> float:
    """With one domain the update is its gradient."""
    draws = [draw(1, seed, dtype) for seed in range(5)]
    return max(distance(update_of(name, G), G[0], G) for G in draws)


def identical(name: str, dtype: torch.dtype) -> float:
    """For identical gradients the update is that gradient, times D for sum rules."""
    draws = [FAMILIES["identical"](draw(D, D, dtype)) for D in DOMAINS]
    return max(distance(update_of(name, G), G[0] * (len(G) if name in SUM_RULES else 1), G) for G in draws)


def no_conflict(name: str, dtype: torch.dtype) -> float:
    """If no two domains conflict, the update is the sum or mean."""
    draws = [FAMILIES["no conflict"](draw(D, D, dtype)) for D in DOMAINS]
    return max(distance(update_of(name, G), G.sum(0) if name in SUM_RULES else G.mean(0), G) for G in draws)


def never_against_a_domain(name: str, dtype: torch.dtype) -> float:
    """<update, g_i> >= 0 for every domain: to first order a step increases the loss of no domain."""
    worst = 0.0
    families = ("random", "opposite pair", "zero row", "rank deficient", "one dominates")
    for family, D, seed in product(families, DOMAINS, range(5)):
        G = FAMILIES[family](draw(D, seed)).to(dtype)
        inner = G @ update_of(name, G) / G.norm(dim=1).clamp_min(SMALLEST)
        worst = max(worst, (-inner.min() / G.norm(dim=1).max()).item())
    return worst


def any_order_of_domains(name: str, dtype: torch.dtype) -> float:
    """The update does not depend on the order of the domains, with fixed draws of random rules."""
    worst = 0.0
    for D, seed in product(DOMAINS, range(5)):
        G, order = draw(D, seed, dtype), torch.randperm(D, generator=torch.Generator().manual_seed(seed))
        worst = max(worst, distance(update_of(name, G), update_of(name, G[order]), G))
    return worst


def scale(name: str, dtype: torch.dtype) -> float:
    """Gradients scaled by s give an update scaled by s, s from 1e-15 to 1e15."""
    draws = product([draw(D, D, dtype) for D in DOMAINS], (1e-15, 1e-3, 1e15))
    return max(distance(update_of(name, G * s) / s, update_of(name, G), G) for G, s in draws)


def no_randomness(name: str, dtype: torch.dtype) -> float:
    """The same gradients give the same update."""
    G = draw(5, 0, dtype)
    return max(distance(update_of(name, G, seed=seed), update_of(name, G), G) for seed in range(5))


PROPERTIES = {
    "one domain": one_domain,
    "identical": identical,
    "no conflict": no_conflict,
    "never against a domain": never_against_a_domain,
    "any order of domains": any_order_of_domains,
    "scale": scale,
    "no randomness": no_randomness,
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("name_of_property", PROPERTIES)
def test_property(name_of_property, name):
    for dtype, tolerance in TOLERANCES.items():
        violation = PROPERTIES[name_of_property](name, dtype)
        with in_case(dtype=dtype):
            if name in HOLDS[name_of_property]:
                assert violation <= tolerance
            else:
                assert violation > 10 * tolerance


@pytest.mark.parametrize("name", RULES)
def test_output_is_finite_and_bounded(name):
    places = [(torch.float64, PerElement()), (torch.float32, PerElement())]
    if name in GRAM_RULES:
        places = [(torch.float64, Chunk(3)), (torch.float32, PerFilter())]
        places += [] if RULES[name]().per_part_state else [(torch.float64, PerElement())]
    for family, D, (dtype, partition) in product(FAMILIES, DOMAINS, places):
        G = FAMILIES[family](draw(D, D)).to(dtype)
        G = G * 1e-6 if dtype == torch.float32 and family == "huge" else G  # its squares must not overflow
        with in_case(family=family, D=D, dtype=dtype, partition=type(partition)):
            update = update_of(name, G, partition)
            assert update.isfinite().all()
            # not of noise, and of two rules that can amplify
            if name not in ("agr_rand", "gradvac", "imtl_g"):
                assert update.norm() <= 3 * D * G.norm(dim=1).sum()


@pytest.mark.parametrize("name", GRAM_RULES)
def test_the_outlier_stage_runs_after_any_gram_rule(name):
    families = ("random", "zero row", "opposite pair", "identical", "one dominates")
    for family, D in product(families, DOMAINS):
        update = update_of(name, FAMILIES[family](draw(D, D)), Chunk(3), alpha=0.3)
        assert update.isfinite().all(), (family, D)
    G = draw(5, 0) * torch.tensor([1, 1, 1, 1, 20.0], dtype=torch.float64)[:, None]  # the last is an outlier
    if name not in ("mgda", "imtl_g", "aligned_mtl", "nash", "upgrad", "dualproj", "cagrad"):  # they even lengths out
        assert distance(update_of(name, G, Chunk(3), alpha=0.3), update_of(name, G, Chunk(3)), G) > 1e-3


@pytest.mark.parametrize("rule", [AgrSum, CorGrad, GradVac, PCGrad])
def test_mean_is_the_sum_over_d(rule):
    G, partition = draw(4, 2), PerElement() if rule is AgrSum else Chunk(3)
    updates = []
    for reduction in ("sum", "mean"):
        params = [torch.zeros(shape, dtype=G.dtype, requires_grad=True) for shape in SHAPES]
        torch.manual_seed(0)
        updates.append(Surgery(params, partition, rule(reduction=reduction)).combine(G))
    assert distance(4 * updates[1], updates[0], G) <= 1e-12


def test_pcgrad_of_single_elements_is_agr_sum():
    """Except for exact zeros, which Agr-Sum counts as disagreement and PCGrad does not; these families have none."""
    families = ("random", "opposite pair", "identical", "no conflict", "tiny", "huge", "one dominates")
    for family, D in product(families, DOMAINS):
        G = FAMILIES[family](draw(D, D))
        assert distance(update_of("pcgrad", G, PerElement()), update_of("agr_sum", G), G) <= 1e-14, (family, D)


def test_pcgrad_of_the_whole_model_is_the_textbook_loop():
    for D, seed in product(DOMAINS, range(10)):
        G = draw(D, seed)
        torch.manual_seed(seed)
        modified = G.clone()
        for i in range(D):
            for j in torch.randperm(D).tolist():
                if j != i and modified[i] @ G[j] < 0:
                    modified[i] -= modified[i] @ G[j] / (G[j] @ G[j]) * G[j]
        assert distance(update_of("pcgrad", G, seed=seed), modified.sum(0), G) <= 1e-12, (D, seed)


@pytest.mark.parametrize("name", ["corgrad", "pcgrad", "mgda"])
def test_element_by_element_is_every_row_of_one_element(name, monkeypatch):
    """The path without a layout of parts against the one with: all tensors as vectors, whose rows are their elements.

    Pieces of all tensors, of several, and tensors of several pieces.
    """
    G = draw(4, 1)
    params = [torch.zeros(shape.numel(), dtype=G.dtype, requires_grad=True) for shape in SHAPES]
    for piece, alpha in product((2**16, 40, 7), (1.0, 0.4)):
        monkeypatch.setattr("gsdg.surgery.elementwise.PIECE", piece)
        torch.manual_seed(0)
        rows = Surgery(params, PerFilter(), RULES[name](), outliers=NormOutliers(alpha), names=NAMES).combine(G)
        assert distance(update_of(name, G, PerElement(), alpha=alpha), rows, G) <= 1e-12, (piece, alpha)


@pytest.mark.parametrize("rule", [CorGrad(order="random"), PCGrad(), GradVac()])
def test_all_parts_of_a_step_share_the_random_orders(rule):
    """Two tensors with the same gradients have the same update."""
    surgery = Surgery([torch.zeros(4, dtype=torch.float64, requires_grad=True) for _ in range(2)], Chunk(1), rule)
    half = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        first, second = surgery.combine(torch.cat((half, half), 1)).split(4)
        torch.testing.assert_close(first, second)


def test_the_table_in_the_docs_is_this_one():
    lines = (REPOSITORY / "gsdg" / "surgery" / "rules" / "README.md").read_text().splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("| rule | " + " | ".join(PROPERTIES)))
    table = {}
    for line in lines[start + 2 :]:
        if not line.startswith("| "):
            break
        rule, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        table[rule.strip("`")] = {name for name, cell in zip(PROPERTIES, cells, strict=True) if cell == "yes"}
    assert table == {rule: {name for name in PROPERTIES if rule in HOLDS[name]} for rule in RULES}


def test_the_families_are_what_their_names_say():
    assert {family(draw(4, 0)).shape for family in FAMILIES.values()} == {(4, SIZE)}
    assert torch.linalg.matrix_rank(FAMILIES["rank deficient"](draw(4, 0))) == 2
    G = draw(4, 0)
    assert (G @ G.T < 0).any() or (G[:, :30] @ G[:, :30].T < 0).any()
    assert surgery_of("corgrad").combiner.layout.n_parts == 1
