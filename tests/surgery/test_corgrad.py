"""The rule against the released one: golden vectors, and section 1 of the method written out as plain loops."""

from __future__ import annotations

import json
import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from gsdg.errors import UserError
from gsdg.surgery import Chunk, CorGrad, GradSurgery, NormOutliers, Surgery

GOLDEN = Path(__file__).parent.parent / "golden" / "corgrad_public.npz"
# rows that 10 and 4 do and do not divide, fewer rows than chunks, vectors, a 0-dim tensor, one row
SHAPES = [(16, 3, 3, 3), (16,), (23, 5), (7, 32), (3,), (), (1, 9)]
SIZE = sum(math.prod(s) for s in SHAPES)


def draw(n_domains: int, seed: int, *, common: float = 0.2) -> torch.Tensor:
    """[D, SIZE] float64; domains share a direction, and differ in scale so that outliers occur."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(n_domains, SIZE, generator=generator, dtype=torch.float64)
    G += common * torch.randn(SIZE, generator=generator, dtype=torch.float64)
    return G * torch.linspace(0.5, 2, n_domains, dtype=torch.float64)[:, None]


def surgery_on(shapes, dtype=torch.float64, **options) -> GradSurgery:
    return GradSurgery([torch.zeros(s, dtype=dtype, requires_grad=True) for s in shapes], **options)


def plain_loops(G, shapes, *, n_parts=10, alpha=0.6, order=None, original=False, guard=1e-12):
    """(update, conflicts, comparisons, removed ratios): section 1 as it reads, plus the guard on vanished g_p.

    Conflicts of cosine above -1e-12, an orthogonal pair's rounding, are not counted.
    """
    D, update, ratios, comparisons, start = len(G), [], [], 0, 0
    order = range(D) if order is None else order
    for shape in shapes:
        size = math.prod(shape)
        rows = [g.reshape(shape[0] if shape else 1, -1).clone() for g in G[:, start : start + size]]
        start += size
        step = math.ceil(len(rows[0]) / n_parts)
        for a in range(0, len(rows[0]), step):
            g = [r[a : a + step] for r in rows]  # views: changes land in rows
            first = [x.clone() for x in g]
            for i in order:
                for p in order:
                    if p == i:
                        continue
                    comparisons += 1
                    onto = first[p] if original else g[p]
                    inner, square = (g[i] * onto).sum(), (onto * onto).sum()
                    if square <= guard * (first[p] ** 2).sum() or inner >= 0:
                        continue
                    if inner < -1e-12 * first[i].norm() * first[p].norm():
                        ratios.append((-inner / square.sqrt() / g[i].norm()).item())
                    g[i] -= inner / square * onto
        norms = torch.stack([r.norm() for r in rows])
        far = (norms - norms.mean()).abs() > norms.std(unbiased=False) + 1e-12 * norms.mean()
        mu = sum(r for r, f in zip(rows, far, strict=True) if not f) / max(1, int((~far).sum()))
        update.append(sum(alpha * r + (1 - alpha) * mu if f else r for r, f in zip(rows, far, strict=True)).flatten())
    return torch.cat(update), len(ratios), comparisons, ratios


def assert_close(found, expected, relative):
    assert (found - expected).norm() <= relative * expected.norm()


@pytest.mark.parametrize("k", range(6))
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_update_equals_the_released_rule_on_golden_vectors(k, dtype, relative):
    golden = np.load(GOLDEN)
    meta = json.loads(str(golden[f"{k}/meta"]))
    surgery = surgery_on(meta["shapes"], dtype, n_parts=meta["n_parts"], alpha=meta["alpha"])
    update = surgery.combine(torch.from_numpy(golden[f"{k}/gradients"]).to(dtype))
    assert_close(update.double(), torch.from_numpy(golden[f"{k}/update"]), relative)


@pytest.mark.parametrize("k", range(6))
def test_conflicts_equal_the_released_ones_but_for_those_of_size_zero(k):
    """The release also counts pairs that it has just made orthogonal, if rounding left them at -1e-17: a coin flip.

    Those add nothing to the sum of removed ratios, which is therefore compared to 1e-9, and the rate from below.
    """
    golden = np.load(GOLDEN)
    meta = json.loads(str(golden[f"{k}/meta"]))
    gradients = torch.from_numpy(golden[f"{k}/gradients"])
    surgery = surgery_on(meta["shapes"], n_parts=meta["n_parts"], alpha=meta["alpha"])
    surgery.combine(gradients)
    rate, ratio = surgery.metrics["conflict_rate"].item(), surgery.metrics["removed_norm_ratio"].item()
    assert rate * ratio == pytest.approx(meta["conflict_rate"] * meta["removed_norm_ratio"], rel=1e-9)
    assert meta["conflict_rate"] * 0.6 < rate <= meta["conflict_rate"] + 1e-12
    _, conflicts, comparisons, ratios = plain_loops(
        gradients, meta["shapes"], n_parts=meta["n_parts"], alpha=meta["alpha"]
    )
    assert rate == pytest.approx(conflicts / comparisons, abs=1e-12)
    assert ratio == pytest.approx(np.mean(ratios), rel=1e-9)


@pytest.mark.parametrize("n_domains", range(1, 7))
@pytest.mark.parametrize(("n_parts", "alpha"), [(10, 0.6), (4, 1.0), (1, 0.0), (100, 0.3)])
def test_equals_plain_loops(n_domains, n_parts, alpha):
    G = draw(n_domains, seed=n_domains)
    surgery = surgery_on(SHAPES, n_parts=n_parts, alpha=alpha)
    expected, conflicts, comparisons, _ = plain_loops(G, SHAPES, n_parts=n_parts, alpha=alpha)
    assert_close(surgery.combine(G), expected, 1e-9)
    assert surgery.metrics["conflict_rate"].item() == pytest.approx(conflicts / max(1, comparisons), abs=1e-12)


@pytest.mark.parametrize("n_domains", [2, 3, 5])
def test_project_on_original_is_textbook_pcgrad_per_chunk(n_domains):
    G = draw(n_domains, seed=7)
    update = surgery_on(SHAPES, alpha=1.0, project_on="original").combine(G)
    assert_close(update, plain_loops(G, SHAPES, alpha=1.0, original=True)[0], 1e-9)
    if n_domains > 2:
        assert (update - plain_loops(G, SHAPES, alpha=1.0)[0]).norm() > 1e-3 * update.norm()


def test_random_order_is_one_permutation_a_step_from_torchs_seed():
    G = draw(3, seed=1)
    surgery = surgery_on(SHAPES, order="random")
    possible = [plain_loops(G, SHAPES, order=order)[0] for order in permutations(range(3))]
    torch.manual_seed(5)
    updates = [surgery.combine(G).clone() for _ in range(20)]
    found = [[torch.allclose(u, p, rtol=1e-9, atol=1e-12) for p in possible].index(True) for u in updates]
    assert len(set(found)) >= 4
    torch.manual_seed(5)
    assert all(torch.equal(u, surgery.combine(G)) for u in updates)


def test_mean_is_the_sum_over_d():
    G = draw(4, seed=2)
    total, mean = (surgery_on(SHAPES, reduction=r).combine(G) for r in ("sum", "mean"))
    assert_close(mean * 4, total, 1e-12)


def test_one_domain_keeps_its_gradient_exactly():
    G = draw(1, seed=3).float()
    surgery = surgery_on(SHAPES, torch.float32)
    assert torch.equal(surgery.combine(G), G[0])
    assert surgery.metrics["conflict_rate"].item() == surgery.metrics["removed_norm_ratio"].item() == 0


@pytest.mark.parametrize("n_domains", [2, 3, 6])
def test_identical_gradients_add_up(n_domains):
    g = draw(1, seed=4)
    surgery = surgery_on(SHAPES)
    assert_close(surgery.combine(g.expand(n_domains, -1)), n_domains * g[0], 1e-12)
    assert surgery.metrics["conflict_rate"].item() == 0


def test_without_conflicts_and_with_alpha_one_the_update_is_the_sum():
    G = draw(4, seed=5).abs()
    assert_close(surgery_on(SHAPES, alpha=1.0).combine(G), G.sum(0), 1e-12)


def test_alpha_moves_norm_outliers_towards_the_others():
    G = torch.tensor([[1.0, 0.0], [0.0, 1.0], [10.0, 0.0]])  # norms 1, 1, 10: the third lies 1.41 std away
    mu = torch.tensor([0.5, 0.5])
    expected = G[0] + G[1] + 0.25 * G[2] + 0.75 * mu
    assert_close(surgery_on([(2,)], torch.float32, n_parts=1, alpha=0.25).combine(G), expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_domains_have_no_outliers(dtype):
    for seed in range(20):
        G = draw(2, seed).to(dtype) * torch.rand(2, 1, generator=torch.Generator().manual_seed(seed)).to(dtype)
        blended, kept = (surgery_on(SHAPES, dtype, alpha=alpha).combine(G) for alpha in (0.0, 1.0))
        assert torch.equal(blended, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_domains", range(2, 7))
def test_a_zero_row_changes_nothing_but_the_outliers(dtype, n_domains):
    G = draw(n_domains, seed=6).to(dtype)
    G[1] = 0
    update = surgery_on(SHAPES, dtype, alpha=1.0).combine(G)
    others = torch.cat((G[:1], G[2:]))
    assert_close(update, surgery_on(SHAPES, dtype, alpha=1.0).combine(others).clone(), 1e-5)
    assert surgery_on(SHAPES, dtype).combine(torch.zeros_like(G)).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_parts", [1, 100])
@pytest.mark.parametrize("project_on", ["modified", "original"])
def test_opposite_gradients_leave_no_noise(dtype, n_parts, project_on):
    """g and -c g: the first vanishes, and the second is not projected on what rounding left of it."""
    g = draw(1, seed=8)[0].to(dtype)
    for c in (0.3, 1.0, 7.0):
        G = torch.stack((g, -c * g))
        surgery = surgery_on(SHAPES, dtype, n_parts=n_parts, alpha=1.0, project_on=project_on)
        update = surgery.combine(G)
        expected = -c * g if project_on == "modified" else torch.zeros_like(g)
        assert (update - expected).norm() <= 1e-5 * g.norm()
        assert 0 <= surgery.metrics["removed_norm_ratio"] <= 1


@pytest.mark.parametrize(("dtype", "rest"), [(torch.float32, 1e-4), (torch.float64, 1e-7)])
def test_nothing_is_projected_on_what_is_left_of_a_vanished_gradient(dtype, rest):
    """The third domain takes the first away but for `rest` e_z; the second, -e_z, must not be projected on that."""
    G = torch.tensor([[1, 0, 0], [0, 0, -1], [-1, 0, rest]], dtype=dtype)
    update = surgery_on([(3,)], dtype, n_parts=1, alpha=1.0).combine(G)
    torch.testing.assert_close(update, torch.tensor([-1, 0, -1], dtype=dtype), rtol=0, atol=3 * rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_deficient_chunks_stay_bounded(dtype):
    """Chunks of one element have Gram matrices of rank 1: any conflict makes a gradient vanish."""
    for seed in range(5):
        G = draw(6, seed).to(dtype)
        update = surgery_on(SHAPES, dtype, n_parts=10**6).combine(G)
        assert update.isfinite().all()
        assert update.norm() <= 2 * G.norm(dim=1).sum()


@pytest.mark.parametrize(
    ("dtype", "exponents", "relative"), [(torch.float64, (-15, 15), 1e-9), (torch.float32, (-12, 12), 1e-4)]
)
def test_scaling_the_gradients_scales_the_update(dtype, exponents, relative):
    G = draw(4, seed=9).to(dtype)
    surgery = surgery_on(SHAPES, dtype)
    update = surgery.combine(G).clone().double()
    rate = surgery.metrics["conflict_rate"].item()
    for exponent in exponents:
        scale = 10.0**exponent
        assert_close(surgery.combine(G * scale).double() / scale, update, relative)
        assert surgery.metrics["conflict_rate"].item() == pytest.approx(rate, abs=0.01)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_layers_weights_reduces_vectors_and_operates_on_the_rest(reduction):
    G = draw(3, seed=10)
    everything, weights = (surgery_on(SHAPES, reduction=reduction, layers=layers) for layers in ("all", "weights"))
    expected = everything.combine(G).split([math.prod(s) for s in SHAPES])
    found = weights.combine(G).split([math.prod(s) for s in SHAPES])
    plain = (G.sum(0) if reduction == "sum" else G.mean(0)).split([math.prod(s) for s in SHAPES])
    for shape, update, operated, reduced in zip(SHAPES, found, expected, plain, strict=True):
        assert_close(update, operated if len(shape) >= 2 else reduced, 1e-12)
    only = [s for s in SHAPES if len(s) >= 2]
    _, conflicts, comparisons, _ = plain_loops(
        torch.cat(
            [g for s, g in zip(SHAPES, G.split([math.prod(s) for s in SHAPES], 1), strict=True) if len(s) >= 2], 1
        ),
        only,
    )
    assert weights.metrics["conflict_rate"].item() == pytest.approx(conflicts / comparisons, abs=1e-12)


def test_log_schedule_falls_from_one_to_zero_and_resumes():
    stage = NormOutliers(schedule="log", total_steps=100)
    assert [stage.alpha_at(t) for t in (0, 9, 99, 1000)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    G = draw(4, seed=11)
    surgery = surgery_on(SHAPES, alpha_schedule="log", total_steps=10)
    updates = [surgery.combine(G).clone() for _ in range(4)]
    assert_close(updates[3], plain_loops(G, SHAPES, alpha=1 - math.log(4) / math.log(10))[0], 1e-9)
    resumed = surgery_on(SHAPES, alpha_schedule="log", total_steps=10)
    resumed.load_state_dict({"step": 3, "rule": {}})
    assert torch.equal(resumed.combine(G), updates[3])
    assert resumed.state_dict() == surgery.state_dict() == {"step": 4, "rule": {}}


def test_runs_without_reading_values_on_the_host():
    """On the meta device there are no values: anything that looked at one would raise."""
    params = [torch.zeros(s, device="meta", requires_grad=True) for s in SHAPES]
    for options in ({}, {"order": "random", "project_on": "original", "layers": "weights", "reduction": "mean"}):
        surgery = GradSurgery(params, **options)
        assert surgery.combine(torch.empty(3, SIZE, device="meta")).shape == (SIZE,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_parts": 0}, "n_parts is 0; .* integer >= 1"),
        ({"n_parts": 2.5}, "n_parts is 2.5"),
        ({"alpha": 1.5}, "alpha is 1.5; .* from 0 to 1"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": "0.6"}, "alpha is '0.6'"),
        ({"alpha_schedule": "cosine"}, "alpha_schedule is 'cosine'; valid: constant, log"),
        ({"alpha_schedule": "log"}, "total_steps is None; give the number of steps"),
        ({"order": "reversed"}, "order is 'reversed'; valid: fixed, random"),
        ({"project_on": "both"}, "project_on is 'both'; valid: modified, original"),
        ({"reduction": "max"}, "reduction is 'max'; valid: sum, mean"),
        ({"layers": "conv"}, "layers is 'conv'; valid: all, weights"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_valid(options, message):
    with pytest.raises(UserError, match=message):
        surgery_on(SHAPES, **options)


def test_partition_and_rule_are_checked_before_any_model_exists():
    with pytest.raises(UserError, match="n_parts"):
        Chunk(0)
    with pytest.raises(UserError, match="alpha"):
        NormOutliers(2)
    G = draw(3, seed=12)
    composed = Surgery(
        [torch.zeros(s, dtype=G.dtype, requires_grad=True) for s in SHAPES],
        Chunk(4),
        CorGrad(),
        outliers=NormOutliers(0.3),
    )
    assert torch.equal(composed.combine(G), surgery_on(SHAPES, n_parts=4, alpha=0.3).combine(G))
