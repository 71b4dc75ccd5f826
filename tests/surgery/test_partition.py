"""Granularities: which rows are one part, against the definition; and that all from `filter` up are one pyramid."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from gsdg.errors import UserError
from gsdg.surgery import (
    Chunk,
    CorGrad,
    Groups,
    NormOutliers,
    PerElement,
    PerFilter,
    PerModule,
    PerTensor,
    Surgery,
    WholeModel,
)
from gsdg.surgery import table as tables
from gsdg.surgery.elements import _pieces
from gsdg.surgery.grams import part_grams
from gsdg.surgery.partition import part_of_rows
from gsdg.surgery.rules import AgrSum, GradVac, PCGrad
from gsdg.surgery.table import group_sums, members

NAMES = ["conv.weight", "conv.bias", "block.0.weight", "block.0.bias", "head.weight", "scale"]
SHAPES = [torch.Size(s) for s in ((8, 3, 2, 2), (8,), (7, 5), (7,), (3, 7), ())]
SIZES = [math.prod(s) for s in SHAPES]
ENDS = torch.tensor(SIZES).cumsum(0).tolist()
LABELS = {  # what the parts are, written out: one label an element
    "model": lambda t, row: 0,
    "module": lambda t, row: ["conv", "conv", "block.0", "block.0", "head", "model"][t],
    "tensor": lambda t, row: t,
    "chunk": lambda t, row: (t, row // math.ceil((SHAPES[t][0] if SHAPES[t] else 1) / 3)),
    "filter": lambda t, row: (t, row),
    "groups": lambda t, row: "bias" if "bias" in NAMES[t] else "block" if "block" in NAMES[t] else "rest",
}
PARTITIONS = {
    "model": WholeModel,
    "module": PerModule,
    "tensor": PerTensor,
    "chunk": lambda **options: Chunk(3, **options),
    "filter": PerFilter,
    "groups": lambda **options: Groups(["*.bias", "block.*"], **options),
}


def expected_parts(name: str, tensors=(0, 1, 2, 3, 4, 5)) -> dict:
    """label -> the indices of its elements on the flat axis."""
    parts: dict = {}
    for t in tensors:
        n_rows = SHAPES[t][0] if SHAPES[t] else 1
        start, row_size = ENDS[t] - SIZES[t], SIZES[t] // n_rows
        for row in range(n_rows):
            first = start + row * row_size
            parts.setdefault(LABELS[name](t, row), []).extend(range(first, first + row_size))
    return parts


@pytest.mark.parametrize("slot", [2**18, 4, 5])
@pytest.mark.parametrize("name", PARTITIONS)
def test_grams_are_those_of_the_written_out_parts(name, slot, monkeypatch):
    monkeypatch.setattr(tables, "SLOT", slot)  # 4, 5: parts of many slots
    G = torch.randn(3, ENDS[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = PARTITIONS[name]().table(SHAPES, "cpu", NAMES)
    grams = part_grams(G, table)
    expected = [G[:, index] @ G[:, index].T for index in expected_parts(name).values()]
    torch.testing.assert_close(grams, torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert table.slot_length.max() <= slot


@pytest.mark.parametrize("name", PARTITIONS)
def test_layers_weights_leaves_vectors_out(name):
    table = PARTITIONS[name](layers="weights").table(SHAPES, "cpu", NAMES) if name != "groups" else None
    if table is None:
        table = Groups(["block.*"], layers="weights").table(SHAPES, "cpu", NAMES)
        assert table.n_operated == 2
        return
    matrices = [t for t, shape in enumerate(SHAPES) if len(shape) >= 2]
    assert table.n_operated == len(expected_parts(name, matrices))
    assert table.n_parts == table.n_operated + 3
    operated = table.slot_part < table.n_operated
    assert set(table.slot_tensor[operated].tolist()) == set(matrices)


@pytest.mark.parametrize("name", PARTITIONS)
def test_slots_lie_within_one_tensor_and_cover_every_element_once(name):
    table = PARTITIONS[name]().table(SHAPES, "cpu", NAMES)
    covered = torch.zeros(ENDS[-1])
    for start, length, tensor in zip(table.slot_start, table.slot_length, table.slot_tensor, strict=True):
        assert ENDS[tensor] - SIZES[tensor] <= start
        assert start + length <= ENDS[tensor]
        covered[start : start + length] += 1
    assert covered.eq(1).all()


@pytest.mark.parametrize("name", PARTITIONS)
def test_every_granularity_is_a_sum_of_row_grams(name):
    G = torch.randn(4, ENDS[-1], dtype=torch.float64)
    rows = part_grams(G, PerFilter().table(SHAPES))
    partition = PARTITIONS[name]()
    parts = part_of_rows(partition, SHAPES, NAMES)
    summed = group_sums(rows, members(parts, max(parts) + 1, "cpu"))
    torch.testing.assert_close(summed, part_grams(G, partition.table(SHAPES, "cpu", NAMES)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["model", "module", "groups"])
def test_outliers_are_looked_for_in_parts_where_a_part_is_more_than_a_tensor(name):
    table = PARTITIONS[name]().table(SHAPES, "cpu", NAMES)
    assert table.part_unit.tolist() == list(range(table.n_parts))


def test_outliers_are_looked_for_in_tensors_where_a_part_is_less():
    """One part of the tensor alone would have other outliers than the whole."""
    table = Chunk(2).table([torch.Size((4, 1)), torch.Size((2, 1))])
    assert table.part_unit.tolist() == [0, 0, 1, 1]
    G = torch.tensor([[1, 0, 9, 9], [1, 0, 9, 9], [1, 0, 9, 9], [5, 0, 9, 9]], dtype=torch.float64)
    params = [torch.zeros(4, 1, dtype=G.dtype, requires_grad=True)]
    updates = [
        Surgery(params, part, CorGrad(), outliers=NormOutliers(0.0)).combine(G).clone() for part in (Chunk(2), Chunk(4))
    ]
    torch.testing.assert_close(updates[0], updates[1])
    assert updates[0][2] == pytest.approx(36.0)


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(UserError, match=r"pattern '\*layer4\*' makes an empty group: it matches no parameter; .*head"):
        Groups(["head.*", "*layer4*"]).table(SHAPES, "cpu", NAMES)
    with pytest.raises(UserError, match="patterns before it take all that it matches"):
        Groups(["block.*", "block.0.weight"]).table(SHAPES, "cpu", NAMES)
    for wrong in ([], "head", [1]):
        with pytest.raises(UserError, match="give a list of one or more name patterns"):
            Groups(wrong)


def test_names_are_asked_for_where_they_are_needed():
    model = nn.Linear(3, 2)
    for partition in (PerModule(), Groups(["*"])):
        with pytest.raises(UserError, match="goes by the parameters' names"):
            Surgery(model.parameters(), partition, CorGrad())
    names = [name for name, _ in model.named_parameters()]
    assert Surgery(model.parameters(), PerModule(), CorGrad(), names=names).table.n_parts == 1


def test_rules_that_do_not_fit_a_granularity_are_refused():
    params = [torch.zeros(4, 2, requires_grad=True)]
    with pytest.raises(UserError, match="AgrSum is an element-wise rule, and the partition is Chunk; valid: element"):
        Surgery(params, Chunk(), AgrSum())
    with pytest.raises(UserError, match="GradVac remembers .* valid: filter and coarser"):
        Surgery(params, PerElement(), GradVac())
    with pytest.raises(UserError, match=r"alpha is 0.5, but AgrSum is an element-wise rule.*; set alpha=1"):
        Surgery(params, PerElement(), AgrSum(), outliers=NormOutliers(0.5))


@pytest.mark.parametrize("by_tensor", [False, True])
@pytest.mark.parametrize("longest", [1, 4, 1000])
def test_pieces_hold_every_element_of_the_chosen_tensors_once(longest, by_tensor):
    sizes, chosen = [3, 0, 5, 9, 1, 0, 2, 6], [True, True, True, False, False, False, True, True]
    tensor_of = [t for t, size in enumerate(sizes) for _ in range(size)]
    pieces = _pieces(sizes, chosen, longest, by_tensor=by_tensor)
    elements = [element for start, stop, _ in pieces for element in range(start, stop)]
    assert elements == [e for e, t in enumerate(tensor_of) if chosen[t]]
    for start, stop, shares in pieces:
        assert 1 <= stop - start <= longest
        assert [t for t, count in shares for _ in range(count)] == tensor_of[start:stop]
        assert not by_tensor or len(shares) == 1
    if longest == 1000:  # as few pieces as there can be
        assert len(pieces) == (4 if by_tensor else 2)


@pytest.mark.parametrize("layers", ["all", "weights"])
@pytest.mark.parametrize("rule", [PCGrad, AgrSum, partial(AgrSum, reduction="mean")])
def test_single_elements_leave_out_what_is_not_operated_on(layers, rule, monkeypatch):
    monkeypatch.setattr("gsdg.surgery.elements.PIECE", 10)  # several pieces a tensor, and tensors in one piece
    params = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
    G = torch.randn(3, ENDS[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    update = Surgery(params, PerElement(layers=layers), rule()).combine(G).split(SIZES)
    agree = (G > 0).all(0) | (G < 0).all(0)
    for found, g, same, shape in zip(update, G.split(SIZES, 1), agree.split(SIZES), SHAPES, strict=True):
        operated = layers == "all" or len(shape) >= 2
        reduced = g.mean(0) if rule().reduction == "mean" else g.sum(0)
        expected = torch.where(same, reduced, 0.0) if operated else reduced
        torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)


def test_masks_rescale_tensor_by_tensor(monkeypatch):
    from gsdg.surgery.rules import AndMask

    G = torch.randn(3, ENDS[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    params = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
    monkeypatch.setattr("gsdg.surgery.elements.PIECE", 10)
    update = Surgery(params, PerElement(), AndMask(tau=1.0)).combine(G).split(SIZES)
    for found, g in zip(update, G.split(SIZES, 1), strict=True):
        mask = g.sign().mean(0).abs() >= 1
        torch.testing.assert_close(found, mask * g.mean(0) / (1e-10 + mask.double().mean()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", [AgrSum, PCGrad])
def test_conflicts_of_single_elements_are_opposite_signs(rule):
    G = torch.tensor([[1.0, 1, -1, 0], [-1, 1, 1, 1], [1, 1, -2, -1]])
    surgery = Surgery([torch.zeros(4, requires_grad=True)], PerElement(), rule())
    surgery.combine(G)
    assert surgery.metrics["removed_norm_ratio"].item() == pytest.approx(1)
    if rule is AgrSum:  # PCGrad compares what is left after the projections before
        assert surgery.metrics["conflict_rate"].item() == pytest.approx(2 * (2 + 0 + 2 + 1) / 24)
