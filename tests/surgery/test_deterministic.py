"""No step uses an operator that adds in an order of the device's own (atomics on CUDA): the same G gives the same bits.

Every rule at every partition, with the norm-outlier stage and without, under a mode that refuses such operators, on a
CPU; on a GPU another test asks torch itself.
"""

from __future__ import annotations

import pytest
import torch
from families import ELEMENT_RULES, RULES, SIZE, surgery_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gsdg.surgery import Chunk, Groups, PerElement, PerFilter, PerModule, PerTensor, WholeModel

# many sources may meet in one target, and CUDA adds them by atomics or writes the last: torch lists them at
# torch.use_deterministic_algorithms
ADDS = {
    "index_add",
    "index_reduce",
    "scatter_add",
    "scatter_reduce",
    "bincount",
    "histc",
    "put",
    "cumsum",
    "segment_reduce",
}
# deterministic where no two sources meet in one target
WRITES = {"index_put", "index_copy", "scatter"}
PARTITIONS = {
    "model": WholeModel,
    "module": PerModule,
    "tensor": PerTensor,
    "chunk": lambda: Chunk(3),
    "filter": PerFilter,
    "groups": lambda: Groups(["conv.*"]),
    "element": PerElement,
}
CASES = [
    (name, partition, alpha)
    for name, make in RULES.items()
    for partition in PARTITIONS
    for alpha in (1.0, 0.6)
    if (partition == "element" and alpha == 1 or name not in ELEMENT_RULES)
    and not (partition == "element" and make().per_part_state)
]


class OneOrder(TorchDispatchMode):
    """Raises at an operator whose result may depend on the order in which a device adds or writes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__.strip("_").removesuffix("_impl")
        assert name not in ADDS, f"{name} adds in any order"
        if name in WRITES:
            accumulates = name == "index_put" and (args[3] if len(args) > 3 else kwargs.get("accumulate", False))
            index = args[1][0] if name == "index_put" else args[2]
            assert not accumulates, f"{name} adds in any order"
            assert len(index.unique()) == index.numel(), f"{name} writes a target twice"
        return function(*args, **kwargs)


def step(name: str, partition: str, alpha: float, G: Tensor) -> Tensor:
    torch.manual_seed(0)
    surgery = surgery_of(name, PARTITIONS[partition](), G.dtype, alpha=alpha, device=G.device)
    return surgery.combine(G)


def draw() -> Tensor:
    return torch.randn(3, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "partition", "alpha"), CASES)
def test_no_operator_of_a_step_adds_in_any_order(name, partition, alpha, monkeypatch):
    monkeypatch.setattr("gsdg.surgery.elements.PIECE", 40)  # pieces of several tensors, tensors of several pieces
    with OneOrder():
        assert step(name, partition, alpha, draw()).isfinite().all()


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, i: x.index_add_(0, i, x),
        lambda x, i: x.scatter_add_(0, i, x),
        lambda x, i: x.scatter_reduce_(0, i, x, "sum"),
        lambda x, i: x.put_(i, x, accumulate=True),
        lambda x, i: x.index_put_((i,), x, accumulate=True),
        lambda x, i: x.__setitem__(i, x),
        lambda x, i: x.index_copy_(0, i, x),
        lambda x, i: torch.bincount(i, x),
        lambda x, i: x.cumsum(0),
    ],
)
def test_the_mode_sees_what_it_should(operation):
    with pytest.raises(AssertionError), OneOrder():
        operation(torch.ones(3), torch.tensor([0, 2, 2]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "partition", "alpha"), CASES)
def test_cuda_gives_the_same_bits_again(name, partition, alpha):
    G = draw().cuda()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(step(name, partition, alpha, G).clone(), step(name, partition, alpha, G))
    finally:
        torch.use_deterministic_algorithms(False)


def test_every_rule_is_here():
    assert {name for name, _, _ in CASES} == set(RULES)
