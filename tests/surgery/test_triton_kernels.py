"""The Triton kernels against slices and matrix products in float64: compiled where there is a GPU, else interpreted."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from gsdg.errors import UserError
from gsdg.surgery import GradSurgery, grams
from gsdg.surgery import table as tables
from gsdg.surgery.table import Piece, Table, build

triton = pytest.importorskip("triton", minversion="3.3", reason="the kernels need triton >= 3.3: tuples of tensors")
tl = importlib.import_module("triton.language")
twins = importlib.import_module("gsdg.surgery.triton")

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
LENGTHS = (1, 7, 128, 129, 1000, 4609)
PARTS = (2, 0, 1, 0, 3, 2)  # of the slots of these lengths: some parts are two slots, none is its slot's number
GAP = 3  # elements between the slots that belong to none
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
FAR = 2**31 + 3


@contextmanager
def put_back(*owners: object) -> Iterator[None]:
    """Whatever happens to the attributes of these modules and classes, afterwards they are as before.

    But names that a module did not have may stay: the interpreter's, which its cache of functions counts on.
    """
    before = [dict(vars(owner)) for owner in owners]
    yield
    for owner, attributes in zip(owners, before, strict=True):
        if isinstance(owner, type):
            for name in vars(owner).keys() - attributes.keys():
                delattr(owner, name)
        for name, value in attributes.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)


@pytest.fixture
def interpreted(monkeypatch):
    """Without a GPU Triton's interpreter takes the compiler's place, for the test that asks.

    Triton reads TRITON_INTERPRET when a function is decorated, and has decorated its own long ago: torchvision imports
    it. So they are decorated again. The interpreter also replaces parts of triton.language, and leaves some so.
    """
    if HAS_GPU:
        yield
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    classes = (value for value in vars(tl.core).values() if isinstance(value, type))
    with put_back(twins, tl, tl.core, tl.math, tl.standard, *classes):
        for module in (tl, tl.standard, twins):
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction):
                    setattr(module, name, triton.jit(value.fn))
        yield


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """A list of the kernels that calls compile, as for an H100, instead of launching them: no GPU is needed."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class H100:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    if not isinstance(twins._gram_kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set for the whole session")
    launched = []
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options) -> None:
        launched.append(run(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    driver.set_active(H100())
    yield launched
    driver.set_active(None)  # as it was: found when it is needed


def scattered() -> Table:
    """Slots of all LENGTHS, a gap before and after each."""
    starts = [GAP + sum(LENGTHS[:i]) + GAP * i for i in range(len(LENGTHS))]
    pieces = [Piece(part, 0, *place) for part, *place in zip(PARTS, starts, LENGTHS, strict=True)]
    return build(pieces, starts[-1] + LENGTHS[-1] + GAP, max(PARTS) + 1, [0] * (max(PARTS) + 1), DEVICE)


def whole(P: int) -> Table:
    """One part, all of P elements."""
    return build([Piece(0, 0, 0, P)], P, 1, [0], DEVICE)


def slots_of(table: Table) -> list[tuple[slice, int]]:
    """The place and the part of every slot."""
    columns = (column.tolist() for column in (table.slot_start, table.slot_length, table.slot_part))
    return [(slice(start, start + length), part) for start, length, part in zip(*columns, strict=True)]


def gradients(D: int, table: Table, dtype: torch.dtype, padding: int = 0) -> torch.Tensor:
    """G [D, P]; whatever belongs to no slot, padding included, is NaN."""
    values = torch.randn(D, table.size + padding, generator=torch.Generator().manual_seed(D), dtype=torch.float64)
    G = torch.full_like(values, torch.nan)
    for place, _ in slots_of(table):
        G[:, place] = values[:, place]
    return G.to(DEVICE, dtype)[:, : table.size]


def weights_of(D: int, table: Table) -> torch.Tensor:
    """[K, D] float64; of an odd D transposed in memory, as from a rule, whose K comes last."""
    generator = torch.Generator().manual_seed(100 + D)
    weights = torch.randn(D, table.n_parts, generator=generator, dtype=torch.float64).to(DEVICE).t()
    return weights if D % 2 else weights.contiguous()


def accumulated(dtype: torch.dtype) -> tuple[torch.dtype, float]:
    """The type that the kernels compute in, and a bound on their relative error."""
    return (torch.float64, 1e-14) if dtype == torch.float64 else (torch.float32, 1e-6)


def update_buffer(table: Table, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((table.size,), 77.0, device=DEVICE, dtype=accumulated(dtype)[0])


def assert_grams(slots: torch.Tensor, G: torch.Tensor, table: Table) -> None:
    dtype, bound = accumulated(G.dtype)
    assert slots.shape == (table.n_slots, len(G), len(G))
    assert slots.dtype == dtype
    for gram, (place, _) in zip(slots.double(), slots_of(table), strict=True):
        rows = G[:, place].double()
        lengths = rows.norm(dim=1)
        assert ((gram - rows @ rows.T).abs() <= bound * lengths[:, None] * lengths).all(), f"slot {place}"


def assert_update(out: torch.Tensor, G: torch.Tensor, weights: torch.Tensor, table: Table) -> None:
    """`out`, an `update_buffer` at first, holds the update in the slots and nothing anywhere else."""
    dtype, bound = accumulated(G.dtype)
    assert out.dtype == dtype
    outside = torch.ones(table.size, dtype=torch.bool)
    for place, part in slots_of(table):
        terms = weights[part, :, None] * G[:, place].double()
        assert ((out[place].double() - terms.sum(0)).abs() <= bound * terms.abs().sum(0)).all(), f"slot {place}"
        outside[place] = False
    assert out[outside.to(DEVICE)].eq(77).all()


@pytest.mark.parametrize(
    ("D", "dtype", "padding"),
    [*((D, torch.float32, 0) for D in range(1, 9)), *((D, dtype, D) for D in (2, 3, 8) for dtype in DTYPES)],
)
def test_both_passes_equal_their_definition(D, dtype, padding, interpreted):
    table = scattered()
    G, weights = gradients(D, table, dtype, padding), weights_of(D, table)
    slots = twins.slot_grams(G, table)
    assert_grams(slots, G, table)
    assert torch.equal(slots, slots.mT)
    out = update_buffer(table, dtype)
    assert twins.combine(G, weights, table, out) is out
    assert_update(out, G, weights, table)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", ["slot_grams", "combine"])
def test_twins_agree_with_the_torch_definition(function, dtype, interpreted):
    from gsdg.surgery import grams

    table = scattered()
    G, weights = gradients(3, table, dtype), weights_of(3, table)
    if function == "slot_grams":
        results = [module.slot_grams(G, table) for module in (twins, grams)]
    else:
        results = [module.combine(G, weights, table, update_buffer(table, dtype)) for module in (twins, grams)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-2 if function == "slot_grams" else 1e-5)


def test_grams_of_parts_of_several_slots(interpreted, monkeypatch):
    monkeypatch.setattr(tables, "SLOT", 300)
    monkeypatch.setattr(tables, "SLOT_ACCELERATOR", 300)
    table = scattered()
    assert table.n_slots == 4 + 4 + 16
    G, weights = gradients(3, table, torch.float32), weights_of(3, table)
    parts = table.sums(twins.slot_grams(G, table))
    for part in range(table.n_parts):
        rows = torch.cat([G[:, place] for place, of in slots_of(table) if of == part], dim=1).double()
        torch.testing.assert_close(parts[part], rows @ rows.T, rtol=1e-5, atol=1e-3)
    out = update_buffer(table, torch.float32)
    assert_update(twins.combine(G, weights, table, out), G, weights, table)


def test_float32_sums_keep_six_digits(interpreted):
    """A sum of 2^14 squares taken one by one in float32 would be off in the fifth."""
    table = whole(2**14)
    G = torch.rand(2, table.size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    torch.testing.assert_close(twins.slot_grams(G, table)[0].double(), G.double() @ G.double().T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 3])
def test_false_finite_gives_zeros_whatever_the_gradients_and_weights_hold(D, dtype, interpreted):
    table = scattered()
    G, weights = gradients(D, table, dtype), weights_of(D, table)
    G[D - 1, 4:6], G[0, -100], weights[1] = torch.nan, torch.inf, torch.nan
    out = update_buffer(table, dtype)
    twins.combine(G, weights, table, out, torch.tensor(False, device=DEVICE))
    for place, _ in slots_of(table):
        assert out[place].eq(0).all()
    assert out[:GAP].eq(77).all()


def test_true_finite_changes_nothing(interpreted):
    table = scattered()
    G, weights = gradients(3, table, torch.float32), weights_of(3, table)
    out = update_buffer(table, torch.float32)
    twins.combine(G, weights, table, out, torch.tensor(True, device=DEVICE))
    assert_update(out, G, weights, table)


def test_nan_reaches_the_update_under_weight_zero(interpreted):
    table = whole(200)
    G, weights = gradients(3, table, torch.float32), torch.ones(1, 3, dtype=torch.float64, device=DEVICE)
    G[1, 100], weights[0, 1] = torch.nan, 0
    assert twins.combine(G, weights, table, torch.empty_like(G[0])).isnan().nonzero().tolist() == [[100]]


def test_nan_in_one_slot_stays_there(interpreted):
    table = scattered()
    G = gradients(3, table, torch.float32)
    G[1, slots_of(table)[2][0].start] = torch.nan
    broken = twins.slot_grams(G, table).isnan()
    assert broken.any(2).any(1).tolist() == [False, False, True, False, False, False]
    assert broken[2].tolist() == [[False, True, False], [True, True, True], [False, True, False]]


def test_two_runs_give_the_same_bits(interpreted):
    table = scattered()
    G, weights = gradients(3, table, torch.float32), weights_of(3, table)
    assert torch.equal(twins.slot_grams(G, table), twins.slot_grams(G, table))
    first, second = (twins.combine(G, weights, table, update_buffer(table, torch.float32)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("rows", ["start", "stride"])
def test_offsets_beyond_32_bits(rows, interpreted):
    """start: a slot from element 2^31 + 3 on. stride: a slot in the third row, whose element 3 is the 2^31 + 5th.

    On the CPU memory that nothing touches costs nothing but addresses.
    """
    try:
        memory = torch.empty(FAR + 1000, dtype=torch.bfloat16, device=DEVICE)
        updates = torch.empty(FAR + 990, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no 13 GB of addresses: {error}")
    if rows == "start":
        G = memory.as_strided((2, FAR + 990), (5, 1))  # rows overlap: half the addresses
        table = build([Piece(0, 0, FAR, 900)], G.shape[1], 1, [0], DEVICE)
    else:
        G = memory.as_strided((3, 990), (2**30 + 1, 1))
        table = build([Piece(0, 0, 3, 900)], G.shape[1], 1, [0], DEVICE)
    ((place, _),) = slots_of(table)
    for d, row in enumerate(G):  # overlapping rows: the last wins where they do
        row[place] = torch.randn(900, generator=torch.Generator().manual_seed(d)).to(DEVICE)
    weights = weights_of(len(G), table)
    assert_grams(twins.slot_grams(G, table), G, table)
    out = twins.combine(G, weights, table, updates[: table.size])
    expected = weights[0] @ G[:, place].double()
    torch.testing.assert_close(out[place].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(HAS_GPU, reason="only the interpreter shows the addresses")
def test_touches_its_slots_and_nothing_beside_them(interpreted, monkeypatch):
    """Loads too: one that no mask stops reads past the end of G, and only sometimes does a GPU complain."""
    memory, touched = importlib.import_module("triton.runtime.interpreter")._interpreter, set()
    load, store = memory.load, memory.store

    def recording_load(pointers, mask, *rest):
        touched.update(pointers[mask].tolist())
        return load(pointers, mask, *rest)

    def recording_store(pointers, values, mask):
        touched.update(pointers[mask].tolist())
        return store(pointers, values, mask)

    monkeypatch.setattr(memory, "load", recording_load)
    monkeypatch.setattr(memory, "store", recording_store)
    table, finite = scattered(), torch.tensor(True)
    G, weights, out = torch.ones(3, table.size), weights_of(3, table), update_buffer(table, torch.float32)
    slots = twins.slot_grams(G, table)
    twins.combine(G, weights, table, out, finite)
    dense = [table.slot_start, table.slot_length, table.slot_part, weights, finite, slots]
    dense += [row[place] for row in (*G, out) for place, _ in slots_of(table)]
    assert touched == {tensor.data_ptr() + i * tensor.element_size() for tensor in dense for i in range(tensor.numel())}


def test_no_slots_no_launch(monkeypatch):
    for kernel in ("_gram_kernel", "_combine_kernel"):
        monkeypatch.setattr(twins, kernel, None)
    table = build([], 10, 0, [], DEVICE)
    G = torch.ones(3, 10, device=DEVICE)
    assert twins.slot_grams(G, table).shape == (0, 3, 3)
    out = update_buffer(table, torch.float32)
    assert twins.combine(G, torch.ones(0, 3, dtype=torch.float64, device=DEVICE), table, out).eq(77).all()


@pytest.mark.parametrize("D", [0, 9])
def test_refuses_more_domains_than_it_has_registers_for(D):
    table = whole(10)
    G, weights = torch.ones(D, 10, device=DEVICE), torch.ones(1, D, dtype=torch.float64, device=DEVICE)
    with pytest.raises(UserError, match=rf"{D} domains.*1 to 8.*GSDG_TRITON=0"):
        twins.slot_grams(G, table)
    with pytest.raises(UserError, match=rf"{D} domains"):
        twins.combine(G, weights, table, torch.ones(10, device=DEVICE))


def test_refuses_more_slots_than_a_grid_has_programs():
    too_many = torch.zeros(1, dtype=torch.int64, device=DEVICE).expand(2**31)
    table = dataclasses.replace(whole(10), slot_part=too_many)
    with pytest.raises(UserError, match="2147483648 slots.*2147483647 programs"):
        twins.slot_grams(torch.ones(3, 10, device=DEVICE), table)


@pytest.mark.skipif(HAS_GPU, reason="with a GPU every other test compiles the kernels")
@pytest.mark.parametrize(("D", "P", "dtype"), [(3, 1, torch.float32), (3, 5, torch.bfloat16), (8, 5, torch.float64)])
def test_compiles_for_an_h100_to_one_launch_a_pass(D, P, dtype, compiled):
    """As `slot_grams` and `combine` call them, P = 1 and so a row stride of 1 included; no atomics, no matrix unit."""
    table = whole(P)
    G, out = torch.ones(D, P, dtype=dtype), torch.ones(P, dtype=accumulated(dtype)[0])
    weights = torch.ones(1, D, dtype=torch.float64)
    twins.slot_grams(G, table)
    twins.combine(G, weights, table, out)
    twins.combine(G, weights, table, out, torch.tensor(True))
    assert len(compiled) == 3
    for kernel in compiled:
        assert re.search(r"\bfma\.rn\.f" + ("64" if dtype == torch.float64 else "32"), kernel.asm["ptx"])
        assert not re.search(r"\b(atom|red|mma|wgmma|cp)\.|tf32", kernel.asm["ptx"])


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_passes_never_wait_for_the_device(dtype):
    table = scattered()
    G, weights = gradients(3, table, dtype), weights_of(3, table)
    out, finite = update_buffer(table, dtype), torch.tensor(True, device=DEVICE)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts = table.sums(twins.slot_grams(G, table))
        twins.combine(G, weights, table, out, finite)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert parts.isfinite().all()
    assert_update(out, G, weights, table)


# ---- where Triton cannot build ---------------------------------------------------------------------------------


class PretendsCuda(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU: simulated, no GPU is needed to see which path is taken."""

    is_cuda = property(lambda self: True)


class CannotBuild:
    """In the place of the kernels' module: raises what Triton raises where there is no C compiler. Simulated."""

    def __init__(self, error: Exception) -> None:
        self.error, self.builds = error, 0

    def build(self, D, dtype, device) -> None:
        self.builds += 1
        raise self.error

    def slot_grams(self, *args):
        raise AssertionError("was not built")

    combine = slot_grams


@pytest.fixture
def instead(monkeypatch):
    """Puts a module in the place of the Triton kernels', and forgets what could be built."""
    monkeypatch.delenv("GSDG_TRITON", raising=False)
    caches = (grams._builds, grams._warn_of_torch_path)
    for cache in caches:
        cache.cache_clear()

    def instead(module):
        monkeypatch.setattr(grams, "_triton_twins", lambda: module)
        return module

    yield instead
    for cache in caches:
        cache.cache_clear()


NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(NO_COMPILER),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        FileNotFoundError("ptxas"),
        PermissionError("/.triton/cache"),
        AssertionError("libcuda.so cannot found!"),
    ],
)
def test_where_the_kernels_cannot_be_built_it_warns_once_and_takes_the_torch_path(instead, caplog, error):
    module = instead(CannotBuild(error))
    G = torch.randn(3, 14, generator=torch.Generator().manual_seed(0))
    surgery = GradSurgery([torch.zeros(5, 2, requires_grad=True), torch.zeros(4, requires_grad=True)])
    expected = surgery.combine(G).clone()
    for D in (3, 3, 2, 3):
        update = surgery.combine(G[:D].as_subclass(PretendsCuda))
        assert D != 3 or torch.equal(update, expected)
    assert module.builds == 2  # once for 3 domains, once for 2
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert type(error).__name__ in record.message
    assert "GSDG_TRITON=0" in record.message


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
    ],
)
def test_an_error_of_the_device_is_not_taken_for_a_missing_compiler(instead, error):
    instead(CannotBuild(error))
    with pytest.raises(RuntimeError, match=re.escape(str(error))):
        grams.kernels(torch.ones(3, 4).as_subclass(PretendsCuda))


def test_an_error_of_a_launch_is_raised(instead):
    """Once built, whatever a kernel raises is an error of that kernel."""

    class Fails(CannotBuild):
        def build(self, D, dtype, device) -> None:
            pass

        def slot_grams(self, *args):
            raise self.error

    instead(Fails(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        GradSurgery([torch.zeros(4, requires_grad=True)]).combine(torch.ones(3, 4).as_subclass(PretendsCuda))


def test_what_is_built_is_taken_and_GSDG_TRITON_0_is_not(instead, monkeypatch):
    class Built(CannotBuild):
        def build(self, D, dtype, device) -> None:
            pass

    module, G = instead(Built(RuntimeError())), torch.ones(3, 4).as_subclass(PretendsCuda)
    assert grams.kernels(G) is module
    assert grams.kernels(torch.ones(9, 4).as_subclass(PretendsCuda)) is grams
    monkeypatch.setenv("GSDG_TRITON", "0")
    assert grams.kernels(G) is grams


@pytest.mark.skipif(HAS_GPU, reason="there is nothing missing")
def test_without_a_gpu_triton_itself_cannot_build(instead):
    """Its own error, not a simulated one: no driver."""
    instead(twins)
    with pytest.raises(RuntimeError, match="active drivers"):
        twins.build(3, torch.float32, torch.device("cpu"))
    assert grams.kernels(torch.ones(3, 4).as_subclass(PretendsCuda)) is grams


@pytest.mark.skipif(HAS_GPU, reason="with a GPU every other test compiles the kernels")
@pytest.mark.parametrize(("D", "dtype"), [(3, torch.float32), (5, torch.bfloat16), (8, torch.float64)])
def test_build_compiles_what_a_step_launches(D, dtype, compiled, monkeypatch):
    """Both kernels, and their launchers, which are what needs the C compiler: only asked for here."""
    asked = []
    run = triton.JITFunction.run

    class Compiled:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        @property
        def run(self):
            asked.append(self.kernel.asm["ptx"])

    def warmed(self, *args, warmup, **options):
        run(self, *args, warmup=warmup, **options)
        return Compiled(compiled[-1])

    monkeypatch.setattr(triton.JITFunction, "run", warmed)
    twins.build(D, dtype, torch.device("cpu"))
    monkeypatch.undo()
    assert [len(re.findall(r"\.entry _(gram|combine)_kernel", ptx)) for ptx in asked] == [1, 1]


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_builds_on_this_gpu(instead):
    instead(twins)
    assert grams.kernels(torch.ones(3, 4, device="cuda")) is twins
