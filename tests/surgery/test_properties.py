"""Which rule has which property: every rule through every property, on families of gradients.

A property is a function of a rule's name and of the gradients' type that returns its worst violation, relative to the
longest gradient. `HOLDS` says where it must be rounding; everywhere else the test demands a clear counterexample, so
that the table cannot go stale. The table of gsdg/surgery/rules/README.md is compared with it.
"""

from __future__ import annotations

import pytest
import torch
from families import ELEMENT_RULES, FAMILIES, GRAM_RULES, NAMES, RULES, SHAPES, SIZE, draw, surgery_of, update_of
from helpers import REPOSITORY

from gsdg.surgery import Chunk, NormOutliers, PerElement, PerFilter, Surgery
from gsdg.surgery.rules import CorGrad, PCGrad

TOLERANCES = {
    torch.float64: 1e-7,  # of float64 algebra on degenerate matrices
    torch.float32: 1e-6,  # some roundings of 6e-8 each in the products and the sum of six gradients
}
SMALLEST = 1e-30  # in place of 0 where it divides
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
    """A single domain's gradient is the update."""
    draws = [draw(1, seed, dtype) for seed in range(5)]
    return max(distance(update_of(name, G), G[0], G) for G in draws)


def identical(name: str, dtype: torch.dtype) -> float:
    """Identical gradients are the update, D times for sum rules."""
    worst = 0.0
    for D in DOMAINS:
        G = FAMILIES["identical rows"](D, D).to(dtype)
        worst = max(worst, distance(update_of(name, G), G[0] * (D if name in SUM_RULES else 1), G))
    return worst


def no_conflict(name: str, dtype: torch.dtype) -> float:
    """Where no two domains disagree the update is their sum or mean."""
    worst = 0.0
    for D in DOMAINS:
        G = FAMILIES["no conflict"](D, D).to(dtype)
        worst = max(worst, distance(update_of(name, G), G.sum(0) if name in SUM_RULES else G.mean(0), G))
    return worst


def never_against_a_domain(name: str, dtype: torch.dtype) -> float:
    """<update, g_i> >= 0 for every domain: at first order a step makes no domain's loss worse."""
    worst = 0.0
    for family in ("random", "opposite pair", "zero row", "rank deficient", "one dominates"):
        for D in DOMAINS:
            for seed in range(5):
                G = FAMILIES[family](D, seed).to(dtype)
                inner = G @ update_of(name, G) / G.norm(dim=1).clamp_min(SMALLEST)
                worst = max(worst, (-inner.min() / G.norm(dim=1).max()).item())
    return worst


def any_order_of_domains(name: str, dtype: torch.dtype) -> float:
    """The update does not depend on the order in which the domains come; the draws of random rules held fixed."""
    worst = 0.0
    for D in DOMAINS:
        for seed in range(5):
            G, order = draw(D, seed, dtype), torch.randperm(D, generator=torch.Generator().manual_seed(seed))
            worst = max(worst, distance(update_of(name, G), update_of(name, G[order]), G))
    return worst


def scale(name: str, dtype: torch.dtype) -> float:
    """Gradients s times as long make an update s times as long, s from 1e-15 to 1e15."""
    worst = 0.0
    for D in DOMAINS:
        G = draw(D, D, dtype)
        for s in (1e-15, 1e-3, 1e15):
            worst = max(worst, distance(update_of(name, G * s) / s, update_of(name, G), G))
    return worst


def no_randomness(name: str, dtype: torch.dtype) -> float:
    """The same gradients make the same update."""
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
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_property(dtype, name_of_property, name):
    violation = PROPERTIES[name_of_property](name, dtype)
    if name in HOLDS[name_of_property]:
        assert violation <= TOLERANCES[dtype]
    else:
        assert violation > 10 * TOLERANCES[dtype]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RULES)
def test_output_is_finite_and_bounded(name, family):
    for D in DOMAINS:
        for dtype in (torch.float64, torch.float32):
            G = FAMILIES[family](D, D).to(dtype)
            G = G * 1e-6 if dtype == torch.float32 and family == "huge" else G  # its squares must not overflow
            for partition in [None] if name in ELEMENT_RULES else [None, Chunk(3), PerFilter()]:
                update = update_of(name, G, partition)
                assert update.isfinite().all()
                if name not in ("agr_rand", "gradvac", "imtl_g"):  # noise, and two that can amplify
                    assert update.norm() <= 3 * D * G.norm(dim=1).sum()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(set(GRAM_RULES) - {"gradvac"}))
def test_gram_rules_at_single_elements_are_finite(name, family):
    for D in (1, 2, 3, 5):
        update = update_of(name, FAMILIES[family](D, D), PerElement())
        assert update.isfinite().all()


@pytest.mark.parametrize("name", GRAM_RULES)
@pytest.mark.parametrize("family", ["random", "zero row", "opposite pair", "identical rows", "one dominates"])
def test_the_outlier_stage_runs_after_any_gram_rule(name, family):
    for D in DOMAINS:
        G = FAMILIES[family](D, D)
        assert update_of(name, G, Chunk(3), alpha=0.3).isfinite().all()
    G = draw(5, 0) * torch.tensor([1, 1, 1, 1, 20.0], dtype=torch.float64)[:, None]  # the last is an outlier
    if name not in ("mgda", "imtl_g", "aligned_mtl", "nash", "upgrad", "dualproj", "cagrad"):  # they even lengths out
        assert distance(update_of(name, G, Chunk(3), alpha=0.3), update_of(name, G, Chunk(3)), G) > 1e-3


@pytest.mark.parametrize("n_domains", DOMAINS)
def test_pcgrad_of_single_elements_is_agr_sum(n_domains):
    """But for exact zeros, which Agr-Sum counts as disagreement and PCGrad does not: the families here have none."""
    for family in ("random", "opposite pair", "identical rows", "no conflict", "tiny", "huge", "one dominates"):
        G = FAMILIES[family](n_domains, n_domains)
        assert distance(update_of("pcgrad", G, PerElement()), update_of("agr_sum", G), G) <= 1e-14


@pytest.mark.parametrize("n_domains", DOMAINS)
def test_pcgrad_of_the_whole_model_is_the_textbook_loop(n_domains):
    for seed in range(10):
        G = draw(n_domains, seed)
        torch.manual_seed(seed)
        modified = G.clone()
        for i in range(n_domains):
            for j in torch.randperm(n_domains).tolist():
                if j != i and modified[i] @ G[j] < 0:
                    modified[i] -= modified[i] @ G[j] / (G[j] @ G[j]) * G[j]
        assert distance(update_of("pcgrad", G, seed=seed), modified.sum(0), G) <= 1e-12


def test_corgrad_without_conflicts_or_outlier_stage_is_the_sum():
    G = FAMILIES["no conflict"](4, 0)
    assert distance(update_of("corgrad", G, Chunk(3)), G.sum(0), G) <= 1e-12


@pytest.mark.parametrize("alpha", [1.0, 0.4])
@pytest.mark.parametrize("name", ["corgrad", "pcgrad", "mgda"])
@pytest.mark.parametrize("piece", [2**16, 40, 7])
def test_element_by_element_is_every_row_of_one_element(piece, name, alpha, monkeypatch):
    """The path without a table against the one with: all tensors as vectors, whose rows are their elements.

    Pieces of all tensors, of several, and tensors of several pieces.
    """
    monkeypatch.setattr("gsdg.surgery.elements.PIECE", piece)
    G = draw(4, 1)
    params = [torch.zeros(shape.numel(), dtype=G.dtype, requires_grad=True) for shape in SHAPES]
    torch.manual_seed(0)
    rows = Surgery(params, PerFilter(), RULES[name](), outliers=NormOutliers(alpha), names=NAMES).combine(G)
    assert distance(update_of(name, G, PerElement(), alpha=alpha), rows, G) <= 1e-12


@pytest.mark.parametrize("rule", [CorGrad(order="random"), PCGrad()])
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
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("| "):
            break
        rule, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        found[rule.strip("`")] = {name for name, cell in zip(PROPERTIES, cells, strict=True) if cell == "yes"}
    assert found == {rule: {name for name in PROPERTIES if rule in HOLDS[name]} for rule in RULES}


def test_the_families_are_what_their_names_say():
    assert {family(4, 0).shape for family in FAMILIES.values()} == {(4, SIZE)}
    assert torch.linalg.matrix_rank(FAMILIES["rank deficient"](4, 0)) == 2
    G = FAMILIES["random"](4, 0)
    assert (G @ G.T < 0).any() or (G[:, :30] @ G[:, :30].T < 0).any()
    assert surgery_of("corgrad").table.n_parts == 1
