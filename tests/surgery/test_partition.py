"""Partitions: which rows are one part, against the definition; Gram matrices from `filter` to `model` are row sums."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import families
import pytest
import torch
from families import normal
from helpers import in_case
from torch import nn

from gsdg.surgery import Chunk, CorGrad, Groups, NormOutliers, PerElement, PerFilter, PerModule, Surgery
from gsdg.surgery import part_layout as tables
from gsdg.surgery.elementwise import _pieces
from gsdg.surgery.kernels.torch_kernels import part_grams
from gsdg.surgery.part_layout import group_sums, members
from gsdg.surgery.partition import part_of_rows
from gsdg.surgery.rules import AgrRand, AgrSum, AndMask, GradVac, PCGrad
from gsdg.utils.errors import UserError

NAMES = ["conv.weight", "conv.bias", "block.0.weight", "block.0.bias", "head.weight", "scale"]
SHAPES = [torch.Size(s) for s in ((8, 3, 2, 2), (8,), (7, 5), (7,), (3, 7), ())]
SIZES = [math.prod(s) for s in SHAPES]
ENDS = torch.tensor(SIZES).cumsum(0).tolist()
LABELS = {  # the parts by definition: one label per row
    "model": lambda t, row: 0,
    "module": lambda t, row: ["conv", "conv", "block.0", "block.0", "head", "model"][t],
    "tensor": lambda t, row: t,
    "chunk": lambda t, row: (t, row // math.ceil((SHAPES[t][0] if SHAPES[t] else 1) / 3)),
    "filter": lambda t, row: (t, row),
    "groups": lambda t, row: "bias" if "bias" in NAMES[t] else "block" if "block" in NAMES[t] else "rest",
}
PARTITIONS = families.PARTITIONS | {"groups": partial(Groups, ["*.bias", "block.*"])}
del PARTITIONS["element"]  # it has no layout


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


@pytest.mark.parametrize("name", PARTITIONS)
def test_grams_are_those_of_the_written_out_parts(name, monkeypatch):
    """And sums of those of their rows. Slots lie within one tensor, and cover every element once."""
    G, partition = normal(4, ENDS[-1]), PARTITIONS[name]()
    expected = torch.stack([G[:, index] @ G[:, index].T for index in expected_parts(name).values()])
    parts = part_of_rows(partition, SHAPES, NAMES)
    sums = group_sums(part_grams(G, PerFilter().layout(SHAPES)), members(parts, max(parts) + 1, "cpu"))
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)
    for slot in (2**18, 4, 5):  # 4, 5: parts of many slots
        monkeypatch.setattr(tables, "SLOT", slot)
        layout = partition.layout(SHAPES, "cpu", NAMES)
        covered = torch.zeros(ENDS[-1])
        with in_case(slot=slot):
            torch.testing.assert_close(part_grams(G, layout), expected, rtol=1e-12, atol=1e-12)
            assert layout.slot_length.max() <= slot
            for start, length, tensor in zip(layout.slot_start, layout.slot_length, layout.slot_tensor, strict=True):
                assert ENDS[tensor] - SIZES[tensor] <= start
                assert start + length <= ENDS[tensor]
                covered[start : start + length] += 1
            assert covered.eq(1).all()
    if name in ("model", "module", "groups"):  # outliers are looked for in parts where a part is more than a tensor
        assert layout.part_unit.tolist() == list(range(layout.n_parts))


def test_layers_weights_leaves_vectors_out():
    matrices = [t for t, shape in enumerate(SHAPES) if len(shape) >= 2]
    for name in PARTITIONS.keys() - {"groups"}:
        layout = PARTITIONS[name](layers="weights").layout(SHAPES, "cpu", NAMES)
        operated = layout.slot_part < layout.n_operated
        with in_case(partition=name):
            assert layout.n_operated == len(expected_parts(name, matrices))
            assert layout.n_parts == layout.n_operated + 3
            assert set(layout.slot_tensor[operated].tolist()) == set(matrices)
    assert Groups(["block.*"], layers="weights").layout(SHAPES, "cpu", NAMES).n_operated == 2


def test_outliers_are_looked_for_in_tensors_where_a_part_is_less():
    """A single part of the tensor would have other outliers than the whole tensor."""
    layout = Chunk(2).layout([torch.Size((4, 1)), torch.Size((2, 1))])
    assert layout.part_unit.tolist() == [0, 0, 1, 1]
    G = torch.tensor([[1, 0, 9, 9], [1, 0, 9, 9], [1, 0, 9, 9], [5, 0, 9, 9]], dtype=torch.float64)
    params = [torch.zeros(4, 1, dtype=G.dtype, requires_grad=True)]
    updates = [
        Surgery(params, part, CorGrad(), outliers=NormOutliers(0.0)).combine(G).clone() for part in (Chunk(2), Chunk(4))
    ]
    torch.testing.assert_close(updates[0], updates[1])
    assert updates[0][2] == pytest.approx(36.0)


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(UserError, match=r"pattern '\*layer4\*' makes an empty group: it matches no parameter; .*head"):
        Groups(["head.*", "*layer4*"]).layout(SHAPES, "cpu", NAMES)
    with pytest.raises(UserError, match="earlier patterns match all of its parameters"):
        Groups(["block.*", "block.0.weight"]).layout(SHAPES, "cpu", NAMES)
    for wrong in ([], "head", [1]):
        with pytest.raises(UserError, match="give a list of one or more name patterns"):
            Groups(wrong)


def test_names_are_asked_for_where_they_are_needed():
    model = nn.Linear(3, 2)
    for partition in (PerModule(), Groups(["*"])):
        with pytest.raises(UserError, match="needs the names of the parameters"):
            Surgery(model.parameters(), partition, CorGrad())
    names = [name for name, _ in model.named_parameters()]
    assert Surgery(model.parameters(), PerModule(), CorGrad(), names=names).combiner.layout.n_parts == 1


def test_rules_that_do_not_fit_a_granularity_are_refused():
    params = [torch.zeros(4, 2, requires_grad=True)]
    with pytest.raises(UserError, match="AgrSum is an element-wise rule, and the partition is Chunk; valid: element"):
        Surgery(params, Chunk(), AgrSum())
    with pytest.raises(UserError, match="GradVac keeps .* valid: filter and coarser"):
        Surgery(params, PerElement(), GradVac())
    with pytest.raises(UserError, match=r"alpha is 0.5, but AgrSum is an element-wise rule.*; set alpha=1"):
        Surgery(params, PerElement(), AgrSum(), outliers=NormOutliers(0.5))


def test_pieces_hold_every_element_of_the_chosen_tensors_once():
    sizes, chosen = [3, 0, 5, 9, 1, 0, 2, 6], [True, True, True, False, False, False, True, True]
    tensor_of = [t for t, size in enumerate(sizes) for _ in range(size)]
    for longest, by_tensor in product((1, 4, 1000), (False, True)):
        pieces = _pieces(sizes, chosen, longest, by_tensor=by_tensor)
        elements = [element for start, stop, _ in pieces for element in range(start, stop)]
        with in_case(longest=longest, by_tensor=by_tensor):
            assert elements == [e for e, t in enumerate(tensor_of) if chosen[t]]
            for start, stop, shares in pieces:
                assert 1 <= stop - start <= longest
                assert [t for t, count in shares for _ in range(count)] == tensor_of[start:stop]
                assert not by_tensor or len(shares) == 1
            if longest == 1000:  # as few pieces as there can be
                assert len(pieces) == (4 if by_tensor else 2)


def element_update(rule, G: torch.Tensor, layers: str = "all") -> tuple[torch.Tensor, ...]:
    """The update of each tensor of SHAPES at the granularity `element`, for G [D, P]."""
    params = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
    return Surgery(params, PerElement(layers=layers), rule).combine(G).split(SIZES)


@pytest.fixture
def small_pieces(monkeypatch):
    """Several pieces per tensor, and several tensors per piece."""
    monkeypatch.setattr("gsdg.surgery.elementwise.PIECE", 10)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("rule", [PCGrad(), AgrSum(), AgrSum(reduction="mean")])
def test_single_elements_leave_out_what_is_not_operated_on(rule):
    G = normal(3, ENDS[-1], seed=1)
    agree = (G > 0).all(0) | (G < 0).all(0)
    reduced = G.mean(0) if rule.reduction == "mean" else G.sum(0)
    for layers in ("all", "weights"):
        tensors = zip(element_update(rule, G, layers), reduced.split(SIZES), agree.split(SIZES), SHAPES, strict=True)
        for update, plain, same, shape in tensors:
            expected = torch.where(same, plain, 0.0) if layers == "all" or len(shape) >= 2 else plain
            torch.testing.assert_close(update, expected, atol=1e-14, rtol=0)


@pytest.mark.usefixtures("small_pieces")
def test_masks_rescale_tensor_by_tensor_and_noise_is_scaled_by_the_whole_model(monkeypatch):
    G = normal(3, ENDS[-1], seed=2)
    for update, g in zip(element_update(AndMask(tau=1.0), G), G.split(SIZES, 1), strict=True):
        mask = g.sign().mean(0).abs() >= 1
        torch.testing.assert_close(update, mask * g.mean(0) / (1e-10 + mask.double().mean()), rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    agree, rule = (G > 0).all(0) | (G < 0).all(0), AgrRand()
    for _ in range(2):  # the second step starts anew
        update = torch.cat(element_update(rule, G))
        torch.testing.assert_close(update, torch.where(agree, G.sum(0), G.sum(0)[agree].abs().mean()))


def test_conflicts_of_single_elements_are_opposite_signs():
    G = torch.tensor([[1.0, 1, -1, 0], [-1, 1, 1, 1], [1, 1, -2, -1]])
    for rule in (AgrSum(), PCGrad()):
        surgery = Surgery([torch.zeros(4, requires_grad=True)], PerElement(), rule)
        surgery.combine(G)
        assert surgery.metrics["removed_norm_ratio"].item() == pytest.approx(1)
        if isinstance(rule, AgrSum):  # PCGrad compares gradients after earlier projections
            assert surgery.metrics["conflict_rate"].item() == pytest.approx(2 * (2 + 0 + 2 + 1) / 24)
