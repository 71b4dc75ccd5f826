"""The layout of the parts and the two passes, against slices and matrix products."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from families import normal
from helpers import in_case

from gsdg.surgery import part_layout as tables
from gsdg.surgery.kernels.torch_kernels import combine, part_grams
from gsdg.surgery.part_layout import SMALL
from gsdg.surgery.partition import Chunk

SHAPES = [
    torch.Size(shape)
    for shape in ((64, 3, 2, 2), (7, 32), (10,), (10,), (), (3, SMALL), (2, SMALL + 7), (23, 5), (0, 4))
]
SIZE = sum(map(math.prod, SHAPES))


def slices(shapes, n_parts):
    """The parts by definition, from torch.chunk: (tensor, indices on the flat axis)."""
    start = 0
    for tensor, shape in enumerate(shapes):
        rows = torch.arange(start, start + math.prod(shape)).view(shape)
        start += rows.numel()
        for chunk in (rows if rows.ndim else rows[None]).chunk(n_parts):
            if chunk.numel():
                yield tensor, chunk.flatten()


@pytest.mark.parametrize("n_parts", [1, 4, 10, 1000])
def test_passes_equal_matrix_products_per_chunk(n_parts, monkeypatch):
    parts = list(slices(SHAPES, n_parts))
    for slot, dtype in product([2**18, 1000, SMALL], [torch.float32, torch.float64]):
        monkeypatch.setattr(tables, "SLOT", slot)  # 1000: parts of several slots
        G = normal(3, SIZE).to(dtype)
        layout = Chunk(n_parts).layout(SHAPES)
        assert layout.part_unit.tolist() == [tensor for tensor, _ in parts]
        grams = part_grams(G, layout)
        assert grams.dtype == torch.float64
        assert torch.equal(grams, grams.mT)
        weights = normal(len(parts), 3, seed=1)
        update = combine(G, weights, layout, torch.empty_like(G[0]))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-13
        with in_case(slot=slot, dtype=dtype):
            for k, (_, index) in enumerate(parts):
                rows = G[:, index].double()
                torch.testing.assert_close(grams[k], rows @ rows.T, rtol=tolerance, atol=tolerance * len(index))
                torch.testing.assert_close(update[index].double(), weights[k] @ rows, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layers", ["all", "weights"])
def test_blocks_cover_every_element_once(layers):
    layout = Chunk(10, layers=layers).layout(SHAPES)
    covered = torch.zeros(layout.size)
    for start, count, length, _ in layout.blocks:
        covered[start : start + count * length] += 1
    for elements, slots, length in layout.gathers:
        assert elements.shape == (len(slots) * length,)
        covered[elements] += 1
    assert covered.eq(1).all()


def test_nan_reaches_the_update_under_weight_zero():
    layout = Chunk(10).layout([torch.Size((64, 9))])
    G = torch.randn(3, layout.size)
    G[1, 100] = float("nan")
    weights = torch.ones(layout.n_parts, 3, dtype=torch.float64)
    weights[:, 1] = 0
    update = combine(G, weights, layout, torch.empty(layout.size))
    assert update.isnan().nonzero().tolist() == [[100]]


def test_reduced_matrix_precision_does_not_reach_the_passes():
    layout = Chunk(10).layout([torch.Size((64, 3 * SMALL))])
    G = torch.randn(3, layout.size)
    exact = part_grams(G, layout)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(part_grams(G, layout), exact)
    finally:
        torch.set_float32_matmul_precision(before)
