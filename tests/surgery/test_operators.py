"""Operators that no step may use, found by dispatch modes that raise at them.

- A step never waits for the device: it reads no value, has no data-dependent shape, and copies nothing across devices.
  This runs on the `meta` device, whose tensors have no values (reading one raises).
- The same gradients give the same bits: no operator has an undefined order of additions (atomics on CUDA).

On a GPU, torch's own checks of both are used as well.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from families import ELEMENT_RULES, PARTITIONS, SIZE, VARIANTS, normal, partitions_of, surgery_of
from helpers import in_case
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gsdg.surgery import Chunk, Diagnostics, GradSurgery

READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal", "item"}
# torch.tensor([...], device=...) copies the list to the device; in torch 2.14 without any operator
READS |= {"lift_fresh"}
CARRIES = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
# several sources may have the same target, and CUDA adds them by atomics or writes the last one: torch lists these
# operators at torch.use_deterministic_algorithms
ADDS = {"index_add", "index_reduce", "scatter_add", "scatter_reduce", "put", "bincount", "histc", "cumsum"}
ADDS |= {"segment_reduce"}
# deterministic if no two sources have the same target
WRITES = {"index_put", "index_copy", "scatter"}

every_rule = pytest.mark.parametrize("name", VARIANTS)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class NothingIsCarried(TorchFunctionMode):
    """Raises at a function that copies Python numbers to the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        assert function not in CARRIES or made.device.type == "cpu", f"{function.__name__} copies data to the device"
        return made


class NothingWaits(TorchDispatchMode):
    """Raises at an operator that reads a value on the host, or copies data to or from the host."""

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
        on_device = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.device.type != "cpu"]
        assert not (name in READS and on_device), f"{name} reads a value of the device"
        if name in ("_to_copy", "copy_", "to"):
            devices = {x.device.type for x in args if isinstance(x, Tensor)}
            devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") else set()
            assert len(devices) <= 1, f"{name} between {devices}"
        if name in ("index", "index_put", "index_put_"):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{name} with a boolean mask"
        return function(*args, **kwargs)


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


def places(name: str) -> list[tuple[str, float]]:
    """(partition, alpha) at which to try a rule: one with parts, and `element`; for two rules every partition."""
    if name in ELEMENT_RULES:
        return [("element", 1.0)]
    if name in ("corgrad", "mgda"):
        return [("chunk", 1.0), *((partition, 0.6) for partition in partitions_of(name))]
    return [(partition, 0.6) for partition in ("chunk", "element") if partition in partitions_of(name)]


@every_rule
def test_no_step_waits_for_the_device(name):
    for (partition, alpha), D in [*product(places(name), [3]), *product(places(name)[-1:], [1, 5])]:
        with in_case(partition=partition, alpha=alpha, D=D):
            surgery = surgery_of(name, PARTITIONS[partition](), torch.float32, alpha=alpha, device="meta")
            G = torch.empty(D, SIZE, device="meta")
            if surgery.rule.per_part_state:
                surgery.combine(G)  # allocates the state
            with NothingWaits():
                assert surgery.combine(G).shape == (SIZE,)
            assert all(value.ndim == 0 for value in surgery.metrics.values())


@pytest.mark.parametrize("storage", ["full", "bf16"])
def test_no_backward_waits_for_the_device(storage):
    """One weight is transposed, no loss reaches one layer; with a scaler the steps are counted on the device."""
    for shared_graph, scaled, layers in [(False, False, "all"), (True, False, "weights"), (True, True, "all")]:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 36, 5)).to("meta")
        model[3].weight = nn.Parameter(torch.empty(8 * 36, 5, device="meta").t())
        params = [*model.parameters(), nn.Parameter(torch.empty(3, device="meta"))]
        surgery = GradSurgery(params, storage=storage, alpha_schedule="log", total_steps=9, layers=layers)
        images = torch.empty(2, 4, 3, 8, 8, device="meta")
        labels = torch.empty(4, dtype=torch.int64, device="meta")
        scaler = torch.amp.GradScaler("cpu") if scaled else None

        def losses(model=model, images=images, labels=labels):
            return (cross_entropy(model(x), labels) for x in images)

        with in_case(shared_graph=shared_graph, scaled=scaled, layers=layers):
            surgery.backward(losses(), scaler=scaler)
            with NothingWaits():
                metrics = surgery.backward(losses(), ["art", "photo"], shared_graph=shared_graph, scaler=scaler)
            assert set(metrics) == {"loss", "conflict_rate", "removed_norm_ratio"}
            assert [p.grad is None for p in params] == [False] * 6 + [True]


def test_diagnostics_are_the_only_thing_that_waits():
    surgery = surgery_of("corgrad", Chunk(3), torch.float32, device="meta")
    surgery._buffers._G, surgery._n_domains = torch.empty(3, SIZE, device="meta"), 3
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        Diagnostics()(surgery)


def step(name: str, partition: str, alpha: float, device: str = "cpu") -> Tensor:
    torch.manual_seed(0)
    surgery = surgery_of(name, PARTITIONS[partition](), torch.float32, alpha=alpha, device=device)
    return surgery.combine(normal(3, SIZE).float().to(device))


@every_rule
def test_no_operator_of_a_step_adds_in_any_order(name, monkeypatch):
    monkeypatch.setattr("gsdg.surgery.elementwise.PIECE", 40)  # pieces of several tensors, tensors of several pieces
    for partition, alpha in places(name):
        with in_case(partition=partition, alpha=alpha), OneOrder():
            assert step(name, partition, alpha).isfinite().all()


def test_the_modes_see_what_they_should():
    waits = [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x * torch.tensor([1.0, 2.0], device="meta"),
        lambda x: x * x.new_tensor([1.0, 2.0]),
        lambda x: torch.linalg.eigh(torch.outer(x, x)).eigenvalues.sum().item(),
    ]
    for number, wait in enumerate(waits):
        with in_case(wait=number), pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NothingWaits():
            wait(torch.ones(2, device="meta"))
    additions = [
        lambda x, i: x.index_add_(0, i, x),
        lambda x, i: x.scatter_add_(0, i, x),
        lambda x, i: x.scatter_reduce_(0, i, x, "sum"),
        lambda x, i: x.put_(i, x, accumulate=True),
        lambda x, i: x.index_put_((i,), x, accumulate=True),
        lambda x, i: x.__setitem__(i, x),
        lambda x, i: x.index_copy_(0, i, x),
        lambda x, i: torch.bincount(i, x),
        lambda x, i: x.cumsum(0),
    ]
    for number, add in enumerate(additions):
        with in_case(addition=number), pytest.raises(AssertionError), OneOrder():
            add(torch.ones(3), torch.tensor([0, 2, 2]))


@needs_gpu
@every_rule
def test_cuda_gives_the_same_bits_again(name):
    torch.use_deterministic_algorithms(True)  # the fixture restore_global_state switches it off
    for partition, alpha in places(name):
        with in_case(partition=partition, alpha=alpha):
            assert torch.equal(step(name, partition, alpha, "cuda").clone(), step(name, partition, alpha, "cuda"))


@needs_gpu
@every_rule
def test_cuda_never_synchronises_and_gives_the_update_of_the_cpu(name):
    G = normal(3, SIZE).float().cuda()
    for partition, _ in places(name):
        surgery = surgery_of(name, PARTITIONS[partition](), torch.float32, device="cuda")
        surgery.combine(G)  # compiles the kernels and allocates the state
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with in_case(partition=partition):
                update = surgery.combine(G)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if name in ("mean", "sum", "corgrad", "mgda", "upgrad", "dualproj", "agr_sum", "and_mask"):
            expected = surgery_of(name, PARTITIONS[partition](), torch.float32).combine(G.cpu())
            torch.testing.assert_close(update.cpu(), expected, rtol=1e-3, atol=1e-4)
