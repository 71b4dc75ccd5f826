"""The table of parts and the two passes, against slices and matrix products."""

from __future__ import annotations

import math

import pytest
import torch

from gsdg.surgery import table as tables
from gsdg.surgery.grams import combine, part_grams
from gsdg.surgery.partition import Chunk
from gsdg.surgery.table import SMALL

SHAPES = [(64, 3, 2, 2), (7, 32), (10,), (10,), (), (3, SMALL), (2, SMALL + 7), (23, 5), (0, 4)]


def slices(shapes, n_parts):
    """What the parts are by definition: (tensor, indices on the flat axis), by torch.chunk."""
    start = 0
    for tensor, shape in enumerate(shapes):
        rows = torch.arange(start, start + math.prod(shape)).view(shape)
        start += rows.numel()
        for chunk in (rows if rows.ndim else rows[None]).chunk(n_parts):
            if chunk.numel():
                yield tensor, chunk.flatten()


@pytest.mark.parametrize("n_parts", [1, 4, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slot", [2**18, 1000, SMALL])
def test_passes_equal_matrix_products_per_chunk(n_parts, dtype, slot, monkeypatch):
    monkeypatch.setattr(tables, "SLOT", slot)  # 1000: parts of several slots
    G = torch.randn(3, sum(math.prod(s) for s in SHAPES), dtype=dtype)
    table = Chunk(n_parts).table([torch.Size(s) for s in SHAPES])
    parts = list(slices(SHAPES, n_parts))
    assert table.part_unit.tolist() == [tensor for tensor, _ in parts]
    grams = part_grams(G, table)
    assert grams.dtype == torch.float64
    weights = torch.randn(len(parts), 3, dtype=torch.float64)
    update = combine(G, weights, table, torch.empty_like(G[0]))
    for k, (_, index) in enumerate(parts):
        rows = G[:, index].double()
        tolerance = 1e-5 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(grams[k], rows @ rows.T, rtol=tolerance, atol=tolerance * len(index))
        torch.testing.assert_close(update[index].double(), weights[k] @ rows, rtol=tolerance, atol=tolerance)


def test_grams_are_symmetric_to_the_bit():
    table = Chunk(4).table([torch.Size(s) for s in SHAPES])
    grams = part_grams(torch.randn(4, table.size), table)
    assert torch.equal(grams, grams.mT)


def test_reduced_tensors_come_after_the_operated_ones():
    table = Chunk(4, layers="weights").table([torch.Size(s) for s in SHAPES])
    ndim = [len(SHAPES[t]) for t in table.part_unit.tolist()]
    assert min(ndim[: table.n_operated]) >= 2 > max(ndim[table.n_operated :])


def test_long_float32_sums_keep_six_digits():
    """A sum of 260,000 squares taken one by one would be off in the fifth."""
    table = Chunk(1).table([torch.Size((1, 2**18))])
    G = torch.rand(3, table.size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(part_grams(G, table)[0], G.double() @ G.double().T, rtol=1e-6, atol=0)


def test_blocks_cover_every_element_once():
    for layers in ("all", "weights"):
        table = Chunk(10, layers=layers).table([torch.Size(s) for s in SHAPES])
        covered = torch.zeros(table.size)
        for start, count, length, _ in table.blocks:
            covered[start : start + count * length] += 1
        for elements, slots, length in table.gathers:
            assert elements.shape == (len(slots) * length,)
            covered[elements] += 1
        assert covered.eq(1).all()


def test_nan_reaches_the_update_under_weight_zero():
    table = Chunk(10).table([torch.Size((64, 9))])
    G = torch.randn(3, table.size)
    G[1, 100] = float("nan")
    weights = torch.ones(table.n_parts, 3, dtype=torch.float64)
    weights[:, 1] = 0
    update = combine(G, weights, table, torch.empty(table.size))
    assert update.isnan().nonzero().tolist() == [[100]]


def test_reduced_matrix_precision_does_not_reach_the_passes():
    table = Chunk(10).table([torch.Size((64, 3 * SMALL))])
    G = torch.randn(3, table.size)
    exact = part_grams(G, table)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(part_grams(G, table), exact)
    finally:
        torch.set_float32_matmul_precision(before)
