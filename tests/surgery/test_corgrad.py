"""The rule against the released one: golden vectors, and section 1 of the method written out as plain loops."""

from __future__ import annotations

import json
import math
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, draw
from helpers import in_case

from gsdg.surgery import Chunk, CorGrad, GradSurgery, NormOutliers, Surgery
from gsdg.utils.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden" / "corgrad_public.npz"
# rows that 10 and 4 do and do not divide, fewer rows than chunks, vectors, a 0-dim tensor, one row
SHAPES = [(16, 3, 3, 3), (16,), (23, 5), (7, 32), (3,), (), (1, 9)]
SIZES = [math.prod(shape) for shape in SHAPES]
SIZE = sum(SIZES)
DTYPES = (torch.float32, torch.float64)


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


def assert_close(update, expected, relative):
    assert (update - expected).norm() <= relative * expected.norm()


@pytest.mark.parametrize("k", range(6))
def test_equals_the_released_rule_on_golden_vectors(k):
    """The release also counts pairs that it has just made orthogonal, if rounding left them at -1e-17: a coin flip.

    Those add nothing to the sum of removed ratios, which is therefore compared to 1e-9, and the rate from below.
    """
    golden = np.load(GOLDEN)
    meta = json.loads(str(golden[f"{k}/meta"]))
    options = {"n_parts": meta["n_parts"], "alpha": meta["alpha"]}
    gradients, expected = (torch.from_numpy(golden[f"{k}/{name}"]) for name in ("gradients", "update"))
    update = surgery_on(meta["shapes"], torch.float32, **options).combine(gradients.float())
    assert_close(update.double(), expected, 1e-4)
    surgery = surgery_on(meta["shapes"], **options)
    assert_close(surgery.combine(gradients), expected, 1e-9)
    rate, ratio = surgery.metrics["conflict_rate"].item(), surgery.metrics["removed_norm_ratio"].item()
    assert rate * ratio == pytest.approx(meta["conflict_rate"] * meta["removed_norm_ratio"], rel=1e-9)
    assert meta["conflict_rate"] * 0.6 < rate <= meta["conflict_rate"] + 1e-12
    _, conflicts, comparisons, ratios = plain_loops(gradients, meta["shapes"], **options)
    assert rate == pytest.approx(conflicts / comparisons, abs=1e-12)
    assert ratio == pytest.approx(np.mean(ratios), rel=1e-9)


@pytest.mark.parametrize(("n_parts", "alpha"), [(10, 0.6), (4, 1.0), (1, 0.0), (100, 0.3)])
def test_equals_plain_loops(n_parts, alpha):
    families = ("zero row", "identical", "no conflict", "tiny", "huge") if n_parts == 10 else ()
    for family, D in [*product(["random"], range(1, 7)), *product(families, (2, 3, 4, 5))]:
        G = FAMILIES[family](draw(D, D, size=SIZE))
        surgery = surgery_on(SHAPES, n_parts=n_parts, alpha=alpha)
        update = surgery.combine(G)
        expected, conflicts, comparisons, _ = plain_loops(G, SHAPES, n_parts=n_parts, alpha=alpha)
        with in_case(family=family, D=D):
            assert_close(update, expected, 1e-9)
            assert surgery.metrics["conflict_rate"].item() == pytest.approx(conflicts / max(1, comparisons), abs=1e-12)
            assert D > 1 or torch.equal(update, G[0])


def test_project_on_original_is_textbook_pcgrad_per_chunk():
    for D in (2, 3, 5):
        G = draw(D, seed=7, size=SIZE)
        update = surgery_on(SHAPES, alpha=1.0, project_on="original").combine(G)
        assert_close(update, plain_loops(G, SHAPES, alpha=1.0, original=True)[0], 1e-9)
        assert D == 2 or (update - plain_loops(G, SHAPES, alpha=1.0)[0]).norm() > 1e-3 * update.norm()


def test_random_order_is_one_permutation_a_step_from_torchs_seed():
    G = draw(3, seed=2, size=SIZE)
    surgery = surgery_on(SHAPES, order="random")
    possible = [plain_loops(G, SHAPES, order=order)[0] for order in permutations(range(3))]
    torch.manual_seed(5)
    updates = [surgery.combine(G).clone() for _ in range(20)]
    orders = [[torch.allclose(u, p, rtol=1e-9, atol=1e-12) for p in possible].index(True) for u in updates]
    assert len(set(orders)) >= 4
    torch.manual_seed(5)
    assert all(torch.equal(u, surgery.combine(G)) for u in updates)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_domains_have_no_outliers(dtype):
    for seed in range(20):
        G = draw(2, seed, dtype, SIZE) * torch.rand(2, 1, generator=torch.Generator().manual_seed(seed)).to(dtype)
        blended, kept = (surgery_on(SHAPES, dtype, alpha=alpha).combine(G) for alpha in (0.0, 1.0))
        assert torch.equal(blended, kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opposite_gradients_leave_no_noise(dtype):
    """g and -c g: the first vanishes, and the second is not projected on the rounding errors that remain of it."""
    g = draw(1, 8, dtype, SIZE)[0]
    for c, n_parts, project_on in product((0.3, 1.0, 7.0), (1, 100), ("modified", "original")):
        surgery = surgery_on(SHAPES, dtype, n_parts=n_parts, alpha=1.0, project_on=project_on)
        update = surgery.combine(torch.stack((g, -c * g)))
        expected = -c * g if project_on == "modified" else torch.zeros_like(g)
        with in_case(c=c, n_parts=n_parts, project_on=project_on):
            assert (update - expected).norm() <= 1e-5 * g.norm()
            assert 0 <= surgery.metrics["removed_norm_ratio"] <= 1


@pytest.mark.parametrize(("dtype", "rest"), [(torch.float32, 1e-4), (torch.float64, 1e-7)])
def test_nothing_is_projected_on_what_is_left_of_a_vanished_gradient(dtype, rest):
    """Projecting off the third domain leaves `rest` e_z of the first. The second, -e_z, must not be projected on it."""
    G = torch.tensor([[1, 0, 0], [0, 0, -1], [-1, 0, rest]], dtype=dtype)
    update = surgery_on([(3,)], dtype, n_parts=1, alpha=1.0).combine(G)
    torch.testing.assert_close(update, torch.tensor([-1, 0, -1], dtype=dtype), rtol=0, atol=3 * rest)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_layers_weights_reduces_vectors_and_operates_on_the_rest(reduction):
    G = draw(3, seed=10, size=SIZE)
    everything, weights = (surgery_on(SHAPES, reduction=reduction, layers=layers) for layers in ("all", "weights"))
    plain = G.sum(0) if reduction == "sum" else G.mean(0)
    updates = [flat.split(SIZES) for flat in (weights.combine(G), everything.combine(G), plain)]
    for shape, update, operated, reduced in zip(SHAPES, *updates, strict=True):
        assert_close(update, operated if len(shape) >= 2 else reduced, 1e-12)
    matrices = [t for t, shape in enumerate(SHAPES) if len(shape) >= 2]
    G = torch.cat([G.split(SIZES, 1)[t] for t in matrices], 1)
    _, conflicts, comparisons, _ = plain_loops(G, [SHAPES[t] for t in matrices])
    assert weights.metrics["conflict_rate"].item() == pytest.approx(conflicts / comparisons, abs=1e-12)


def test_log_schedule_falls_from_one_to_zero_and_resumes():
    stage = NormOutliers(schedule="log", total_steps=100)
    for step in (int, torch.tensor):  # a tensor once the steps are counted on the device
        assert [float(stage.alpha_at(step(t))) for t in (0, 9, 99, 1000)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    G = draw(4, seed=11, size=SIZE)
    surgery = surgery_on(SHAPES, alpha_schedule="log", total_steps=10)
    updates = [surgery.combine(G).clone() for _ in range(4)]
    assert_close(updates[3], plain_loops(G, SHAPES, alpha=1 - math.log(4) / math.log(10))[0], 1e-9)
    resumed = surgery_on(SHAPES, alpha_schedule="log", total_steps=10)
    resumed.load_state_dict({"step": 3, "rule": {}})
    assert torch.equal(resumed.combine(G), updates[3])
    assert resumed.state_dict() == surgery.state_dict() == {"step": 4, "rule": {}}


def test_a_wrong_option_is_named_with_what_is_valid():
    for options, message in [
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
    ]:
        with in_case(options=options), pytest.raises(UserError, match=message):
            surgery_on(SHAPES, **options)


def test_partition_and_rule_are_checked_before_any_model_exists():
    with pytest.raises(UserError, match="n_parts"):
        Chunk(0)
    with pytest.raises(UserError, match="alpha"):
        NormOutliers(2)
    G = draw(3, seed=12, size=SIZE)
    params = [torch.zeros(s, dtype=G.dtype, requires_grad=True) for s in SHAPES]
    composed = Surgery(params, Chunk(4), CorGrad(), outliers=NormOutliers(0.3))
    assert torch.equal(composed.combine(G), surgery_on(SHAPES, n_parts=4, alpha=0.3).combine(G))
