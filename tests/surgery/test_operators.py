"""The step never waits for the device: nothing in it reads a value, has a shape that depends on one, or changes device.

Without a GPU this runs on the `meta` device, which has no values (looking at one raises), under a mode that forbids the
operators at which CUDA would stall. On a GPU the last test asks CUDA itself.
"""

from __future__ import annotations

import pytest
import torch
from families import ELEMENT_RULES, GRAM_RULES, NAMES, RULES, SHAPES, SIZE, surgery_of
from torch import nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gsdg.surgery import Chunk, Diagnostics, GradSurgery, PerElement, PerFilter, PerModule, WholeModel

READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal", "item"}
READS |= {"lift_fresh"}  # torch.tensor([...], device=...) carries the list there; in torch 2.14 without any operator
CARRIES = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
PARTITIONS = {"model": WholeModel, "module": PerModule, "chunk": lambda: Chunk(3), "filter": PerFilter}


class NothingIsCarried(TorchFunctionMode):
    """Raises at a function that carries numbers of Python's to the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        assert function not in CARRIES or made.device.type == "cpu", f"{function.__name__} carries data to the device"
        return made


class NothingWaits(TorchDispatchMode):
    """Raises at an operator that would read a value on the host, or carry data to or from it."""

    def __enter__(self):
        self._functions = NothingIsCarried()
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        on_device = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.device.type != "cpu"]
        assert not (name in READS and on_device), f"{name} reads a value of the device"
        if name in ("_to_copy", "copy_", "to"):
            devices = {x.device.type for x in args if isinstance(x, torch.Tensor)}
            devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") else set()
            assert len(devices) <= 1, f"{name} between {devices}"
        if name in ("index", "index_put", "index_put_"):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{name} with a boolean mask"
        return function(*args, **kwargs)


CASES = [
    *((name, partition) for name in GRAM_RULES for partition in PARTITIONS),
    *((name, "element") for name in (*ELEMENT_RULES, "corgrad", "mgda")),
]


@pytest.mark.parametrize(("name", "partition"), CASES)
def test_combine(name, partition):
    for D in (1, 3, 5):
        made = PerElement() if partition == "element" else PARTITIONS[partition]()
        alpha = 1.0 if name in ELEMENT_RULES else 0.6
        surgery = surgery_of(name, made, torch.float32, alpha=alpha, device="meta")
        G = torch.empty(D, SIZE, device="meta")
        surgery.combine(G)  # rules with a memory make it
        with NothingWaits():
            assert surgery.combine(G).shape == (SIZE,)
        assert all(value.ndim == 0 for value in surgery.metrics.values())


@pytest.mark.parametrize("storage", ["full", "bf16"])
@pytest.mark.parametrize("shared_graph", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_backward(storage, shared_graph, scaled):
    """One weight is transposed, one layer is reached by no loss; with a scaler the schedule counts on the device."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 36, 5)).to("meta")
    model[3].weight = nn.Parameter(torch.empty(8 * 36, 5, device="meta").t())
    params = [*model.parameters(), nn.Parameter(torch.empty(3, device="meta"))]
    schedule = {"alpha_schedule": "log", "total_steps": 9}
    surgery = GradSurgery(params, storage=storage, **schedule)
    images = torch.empty(2, 4, 3, 8, 8, device="meta")
    labels = torch.empty(4, dtype=torch.int64, device="meta")
    scaler = torch.amp.GradScaler("cpu") if scaled else None

    def losses():
        return (cross_entropy(model(x), labels) for x in images)

    surgery.backward(losses(), scaler=scaler)
    with NothingWaits():
        metrics = surgery.backward(losses(), ["art", "photo"], shared_graph=shared_graph, scaler=scaler)
    assert set(metrics) == {"loss", "conflict_rate", "removed_norm_ratio"}
    assert [p.grad is None for p in params] == [False] * 6 + [True]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x * torch.tensor([1.0, 2.0], device="meta"),
        lambda x: x * x.new_tensor([1.0, 2.0]),
        lambda x: torch.linalg.eigh(torch.outer(x, x)).eigenvalues.sum().item(),
    ],
)
def test_the_mode_sees_what_it_should(wait):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NothingWaits():
        wait(torch.ones(2, device="meta"))


def test_diagnostics_are_the_only_thing_that_waits():
    surgery = surgery_of("corgrad", Chunk(3), torch.float32, device="meta")
    surgery._buffers._G, surgery._n_domains = torch.empty(3, SIZE, device="meta"), 3
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        Diagnostics()(surgery)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "partition"), CASES)
def test_cuda_never_synchronises(name, partition):
    made = PerElement() if partition == "element" else PARTITIONS[partition]()
    surgery = surgery_of(name, made, torch.float32, device="cuda")
    G = torch.randn(3, SIZE, device="cuda")
    surgery.combine(G)  # compiles, and makes what is remembered
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update = surgery.combine(G)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.manual_seed(0)
    here = surgery_of(name, made, torch.float32)
    if name in ("mean", "sum", "corgrad", "mgda", "upgrad", "dualproj", "agr_sum", "and_mask"):
        torch.testing.assert_close(update.cpu(), here.combine(G.cpu()), rtol=1e-3, atol=1e-4)


def test_every_rule_is_here():
    assert {name for name, _ in CASES} == set(RULES)
    assert len(NAMES) == len(SHAPES)
