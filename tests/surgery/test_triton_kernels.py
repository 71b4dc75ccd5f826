"""The Triton kernels against slices and matrix products in float64: compiled on a GPU, otherwise interpreted."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import in_case

from gsdg.surgery import GradSurgery
from gsdg.surgery.kernels import torch_kernels
from gsdg.surgery.part_layout import PartLayout, Piece, build_layout
from gsdg.utils.errors import UserError

triton = pytest.importorskip("triton", minversion="3.3", reason="the kernels need triton >= 3.3: tuples of tensors")
tl = importlib.import_module("triton.language")
triton_kernels = importlib.import_module("gsdg.surgery.kernels.triton_kernels")

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
LENGTHS = (1, 7, 128, 129, 1000, 4609)
PARTS = (2, 0, 1, 0, 3, 2)  # the part of each slot: some parts have two slots, and no part has the number of its slot
GAP = 3  # elements between the slots that belong to no slot
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
FAR = 2**31 + 3


@contextmanager
def put_back(*owners: object) -> Iterator[None]:
    """Restore the attributes of these modules and classes afterwards.

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
    """Without a GPU, run the kernels in Triton's interpreter, for tests that use this fixture.

    Triton reads TRITON_INTERPRET when a function is decorated, and has decorated its own long ago: torchvision imports
    it. So they are decorated again. The interpreter also replaces parts of triton.language, and leaves some so.
    """
    if HAS_GPU:
        yield
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    classes = (value for value in vars(tl.core).values() if isinstance(value, type))
    with put_back(triton_kernels, tl, tl.core, tl.math, tl.standard, *classes):
        for module in (tl, tl.standard, triton_kernels):
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction):
                    setattr(module, name, triton.jit(value.fn))
        yield


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The list of kernels that calls compile, for an H100, instead of launching them: no GPU is needed."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class H100:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    if not isinstance(triton_kernels._gram_kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set for the whole session")
    launched = []
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options) -> None:
        launched.append(run(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    driver.set_active(H100())
    yield launched
    driver.set_active(None)  # as before: determined when it is needed


def scattered() -> PartLayout:
    """Slots of all LENGTHS, with a gap before and after each."""
    starts = [GAP + sum(LENGTHS[:i]) + GAP * i for i in range(len(LENGTHS))]
    pieces = [Piece(part, 0, *place) for part, *place in zip(PARTS, starts, LENGTHS, strict=True)]
    return build_layout(pieces, starts[-1] + LENGTHS[-1] + GAP, max(PARTS) + 1, [0] * (max(PARTS) + 1), DEVICE)


def whole(P: int) -> PartLayout:
    """One part with all P elements."""
    return build_layout([Piece(0, 0, 0, P)], P, 1, [0], DEVICE)


def slots_of(layout: PartLayout) -> list[tuple[slice, int]]:
    """The elements and the part of every slot."""
    columns = (column.tolist() for column in (layout.slot_start, layout.slot_length, layout.slot_part))
    return [(slice(start, start + length), part) for start, length, part in zip(*columns, strict=True)]


def gradients(D: int, layout: PartLayout, dtype: torch.dtype, padding: int = 0) -> torch.Tensor:
    """G [D, P]; all elements outside the slots, including the padding, are NaN."""
    values = torch.randn(D, layout.size + padding, generator=torch.Generator().manual_seed(D), dtype=torch.float64)
    G = torch.full_like(values, torch.nan)
    for place, _ in slots_of(layout):
        G[:, place] = values[:, place]
    return G.to(DEVICE, dtype)[:, : layout.size]


def weights_of(D: int, layout: PartLayout) -> torch.Tensor:
    """[K, D] float64; transposed in memory for an odd D, as a rule returns them, with K last."""
    generator = torch.Generator().manual_seed(100 + D)
    weights = torch.randn(D, layout.n_parts, generator=generator, dtype=torch.float64).to(DEVICE).t()
    return weights if D % 2 else weights.contiguous()


def accumulated(dtype: torch.dtype) -> tuple[torch.dtype, float]:
    """The dtype in which the kernels compute, and a bound of their relative error."""
    return (torch.float64, 1e-14) if dtype == torch.float64 else (torch.float32, 1e-6)


def update_buffer(layout: PartLayout, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((layout.size,), 77.0, device=DEVICE, dtype=accumulated(dtype)[0])


def assert_grams(slots: torch.Tensor, G: torch.Tensor, layout: PartLayout) -> None:
    dtype, bound = accumulated(G.dtype)
    assert slots.shape == (layout.n_slots, len(G), len(G))
    assert slots.dtype == dtype
    for gram, (place, _) in zip(slots.double(), slots_of(layout), strict=True):
        rows = G[:, place].double()
        lengths = rows.norm(dim=1)
        assert ((gram - rows @ rows.T).abs() <= bound * lengths[:, None] * lengths).all(), f"slot {place}"


def assert_update(out: torch.Tensor, G: torch.Tensor, weights: torch.Tensor, layout: PartLayout) -> None:
    """`out`, from `update_buffer`, holds the update in the slots and is unchanged elsewhere."""
    dtype, bound = accumulated(G.dtype)
    assert out.dtype == dtype
    outside = torch.ones(layout.size, dtype=torch.bool)
    for place, part in slots_of(layout):
        terms = weights[part, :, None] * G[:, place].double()
        assert ((out[place].double() - terms.sum(0)).abs() <= bound * terms.abs().sum(0)).all(), f"slot {place}"
        outside[place] = False
    assert out[outside.to(DEVICE)].eq(77).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_passes_equal_their_definition(dtype, interpreted):
    """`finite`, where it is True, changes nothing. Two runs give the same bits."""
    layout = scattered()
    cases = [(D, D, torch.tensor(True, device=DEVICE)) for D in (2, 3, 8)]
    cases += [(D, 0, None) for D in range(1, 9)] if dtype == torch.float32 else []
    cases += [(9, 5, torch.tensor(True, device=DEVICE)), (12, 0, None)]
    cases += [(17, 3, None), (40, 1, None)] if dtype == torch.bfloat16 else []
    for D, padding, finite in cases:
        G, weights, out = gradients(D, layout, dtype, padding), weights_of(D, layout), update_buffer(layout, dtype)
        with in_case(D=D, padding=padding):
            slots = triton_kernels.slot_grams(G, layout)
            assert_grams(slots, G, layout)
            assert torch.equal(slots, slots.mT)
            assert triton_kernels.combine(G, weights, layout, out, finite) is out
            assert_update(out, G, weights, layout)
        if D in (3, 9):
            assert torch.equal(slots, triton_kernels.slot_grams(G, layout))
            assert torch.equal(out, triton_kernels.combine(G, weights, layout, out.clone(), finite))


def test_float32_sums_keep_six_digits(interpreted):
    """A sequential float32 sum of 2^14 squares would be wrong in the fifth digit."""
    layout = whole(2**14)
    G = torch.rand(2, layout.size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    torch.testing.assert_close(
        triton_kernels.slot_grams(G, layout)[0].double(), G.double() @ G.double().T, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_domains_change_no_bit_of_the_first_eight(dtype, interpreted):
    """The kernels for more than 8 domains do the same arithmetic per pair of domains and per element."""
    layout = scattered()
    G, weights = gradients(9, layout, dtype), weights_of(9, layout)
    slots = triton_kernels.slot_grams(G, layout)
    assert torch.equal(slots[:, :8, :8], triton_kernels.slot_grams(G[:8], layout))
    weights[:, 8] = 0
    expected = triton_kernels.combine(G[:8], weights[:, :8], layout, update_buffer(layout, dtype))
    assert torch.equal(triton_kernels.combine(G, weights, layout, update_buffer(layout, dtype)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_false_finite_gives_zeros_whatever_the_gradients_and_weights_hold(dtype, interpreted):
    layout = scattered()
    for D in (1, 3, 9):
        G, weights, out = gradients(D, layout, dtype), weights_of(D, layout), update_buffer(layout, dtype)
        G[D - 1, 4:6], G[0, -100], weights[1] = torch.nan, torch.inf, torch.nan
        triton_kernels.combine(G, weights, layout, out, torch.tensor(False, device=DEVICE))
        with in_case(D=D):
            assert all(out[place].eq(0).all() for place, _ in slots_of(layout))
            assert out[:GAP].eq(77).all()


def test_nan_reaches_the_update_under_weight_zero(interpreted):
    layout = whole(200)
    for D in (3, 12):
        G, weights = gradients(D, layout, torch.float32), torch.ones(1, D, dtype=torch.float64, device=DEVICE)
        G[D - 1, 100], weights[0, D - 1] = torch.nan, 0
        update = triton_kernels.combine(G, weights, layout, torch.empty_like(G[0]))
        assert update.isnan().nonzero().tolist() == [[100]], D


def test_nan_in_one_slot_stays_there(interpreted):
    layout = scattered()
    G = gradients(3, layout, torch.float32)
    G[1, slots_of(layout)[2][0].start] = torch.nan
    broken = triton_kernels.slot_grams(G, layout).isnan()
    assert broken.any(2).any(1).tolist() == [False, False, True, False, False, False]
    assert broken[2].tolist() == [[False, True, False], [True, True, True], [False, True, False]]


def test_nan_of_one_domain_of_many_stays_in_its_row_and_column(interpreted):
    layout = scattered()
    G = gradients(17, layout, torch.float32)
    G[9, slots_of(layout)[2][0].start] = torch.nan
    broken = triton_kernels.slot_grams(G, layout).isnan()
    assert broken.any(2).any(1).tolist() == [False, False, True, False, False, False]
    i, j = torch.meshgrid(torch.arange(17), torch.arange(17), indexing="ij")
    assert torch.equal(broken[2].cpu(), (i == 9) | (j == 9))


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
        layout = build_layout([Piece(0, 0, FAR, 900)], G.shape[1], 1, [0], DEVICE)
    else:
        G = memory.as_strided((3, 990), (2**30 + 1, 1))
        layout = build_layout([Piece(0, 0, 3, 900)], G.shape[1], 1, [0], DEVICE)
    ((place, _),) = slots_of(layout)
    for d, row in enumerate(G):  # overlapping rows: the last wins where they do
        row[place] = torch.randn(900, generator=torch.Generator().manual_seed(d)).to(DEVICE)
    weights = weights_of(len(G), layout)
    assert_grams(triton_kernels.slot_grams(G, layout), G, layout)
    out = triton_kernels.combine(G, weights, layout, updates[: layout.size])
    torch.testing.assert_close(out[place].double(), weights[0] @ G[:, place].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(HAS_GPU, reason="only the interpreter shows the addresses")
@pytest.mark.parametrize("D", [3, 11])
def test_touches_its_slots_and_nothing_beside_them(D, interpreted, monkeypatch):
    """Loads as well: an unmasked load reads past the end of G, and a GPU reports this only sometimes."""
    memory, touched = importlib.import_module("triton.runtime.interpreter")._interpreter, set()
    load, store = memory.load, memory.store

    def recording_load(pointers, mask, *rest):
        touched.update(pointers[mask.astype(bool)].tolist())
        return load(pointers, mask, *rest)

    def recording_store(pointers, values, mask):
        touched.update(pointers[mask.astype(bool)].tolist())
        return store(pointers, values, mask)

    monkeypatch.setattr(memory, "load", recording_load)
    monkeypatch.setattr(memory, "store", recording_store)
    layout, finite = scattered(), torch.tensor(True)
    G, weights, out = torch.ones(D, layout.size), weights_of(D, layout), update_buffer(layout, torch.float32)
    slots = triton_kernels.slot_grams(G, layout)
    triton_kernels.combine(G, weights, layout, out, finite)
    dense = [layout.slot_start, layout.slot_length, layout.slot_part, weights, finite, slots]
    dense += [row[place] for row in (*G, out) for place, _ in slots_of(layout)]
    assert touched == {tensor.data_ptr() + i * tensor.element_size() for tensor in dense for i in range(tensor.numel())}


def test_no_slots_no_launch(monkeypatch):
    for kernel in ("_gram_kernel", "_combine_kernel"):
        monkeypatch.setattr(triton_kernels, kernel, None)
    layout = build_layout([], 10, 0, [], DEVICE)
    G = torch.ones(3, 10, device=DEVICE)
    assert triton_kernels.slot_grams(G, layout).shape == (0, 3, 3)
    out = update_buffer(layout, torch.float32)
    assert triton_kernels.combine(G, torch.ones(0, 3, dtype=torch.float64, device=DEVICE), layout, out).eq(77).all()


def test_refuses_no_domains_and_more_slots_than_a_grid_has_programs():
    layout = whole(10)
    G, weights = torch.ones(0, 10, device=DEVICE), torch.ones(1, 0, dtype=torch.float64, device=DEVICE)
    with pytest.raises(UserError, match="0 domains.*1 or more"):
        triton_kernels.slot_grams(G, layout)
    with pytest.raises(UserError, match="0 domains"):
        triton_kernels.combine(G, weights, layout, torch.ones(10, device=DEVICE))
    too_many = dataclasses.replace(layout, slot_part=torch.zeros(1, dtype=torch.int64, device=DEVICE).expand(2**31))
    with pytest.raises(UserError, match="2147483648 slots.*2147483647 programs"):
        triton_kernels.slot_grams(torch.ones(3, 10, device=DEVICE), too_many)


@pytest.mark.skipif(HAS_GPU, reason="with a GPU every other test compiles the kernels")
def test_compiles_for_an_h100_to_one_launch_a_pass(compiled):
    """As `slot_grams` and `combine` call them, P = 1 and so a row stride of 1 included; no atomics, no matrix unit."""
    many = [(9, 1, torch.float32), (40, 5, torch.bfloat16), (12, 5, torch.float64)]
    for D, P, dtype in [(3, 1, torch.float32), (3, 5, torch.bfloat16), (8, 5, torch.float64), *many]:
        layout = whole(P)
        G, out = torch.ones(D, P, dtype=dtype), torch.ones(P, dtype=accumulated(dtype)[0])
        weights = torch.ones(1, D, dtype=torch.float64)
        compiled.clear()
        triton_kernels.slot_grams(G, layout)
        triton_kernels.combine(G, weights, layout, out)
        triton_kernels.combine(G, weights, layout, out, torch.tensor(True))
        assert len(compiled) == 3
        for kernel in compiled:
            with in_case(D=D, P=P, dtype=dtype):
                assert re.search(r"\bfma\.rn\.f" + ("64" if dtype == torch.float64 else "32"), kernel.asm["ptx"])
                assert not re.search(r"\b(atom|red|mma|wgmma|cp)\.|tf32", kernel.asm["ptx"])


# ---- where Triton cannot build ---------------------------------------------------------------------------------


class PretendsCuda(torch.Tensor):
    """A CPU tensor with is_cuda = True: a mock, so that the choice of the path is tested without a GPU."""

    is_cuda = property(lambda self: True)


class CannotBuild:
    """A mock of the kernels' module that raises what Triton raises without a C compiler."""

    def __init__(self, error: Exception) -> None:
        self.error, self.builds = error, 0

    def compile_kernels(self, D, dtype, device) -> None:
        self.builds += 1
        raise self.error

    def slot_grams(self, *args):
        raise AssertionError("was not built")

    combine = slot_grams


@pytest.fixture
def instead(monkeypatch):
    """Replace the module of the Triton kernels, and clear the caches of what can be built."""
    monkeypatch.delenv("GSDG_TRITON", raising=False)
    caches = (torch_kernels._can_build, torch_kernels._warn_torch_path)
    for cache in caches:
        cache.cache_clear()

    def instead(module):
        monkeypatch.setattr(torch_kernels, "_triton_module", lambda: module)
        return module

    yield instead
    for cache in caches:
        cache.cache_clear()


NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."


def surgery_and_gradients() -> tuple[GradSurgery, torch.Tensor]:
    params = [torch.zeros(5, 2, requires_grad=True), torch.zeros(4, requires_grad=True)]
    return GradSurgery(params), torch.randn(3, 14, generator=torch.Generator().manual_seed(0))


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
    surgery, G = surgery_and_gradients()
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
        torch_kernels.kernels(torch.ones(3, 4).as_subclass(PretendsCuda))


class Built(CannotBuild):
    def compile_kernels(self, D, dtype, device) -> None:
        pass

    def slot_grams(self, *args):
        raise self.error

    combine = slot_grams


def test_after_the_build_any_error_of_a_kernel_is_raised(instead):
    instead(Built(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")))
    surgery, G = surgery_and_gradients()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        surgery.combine(G.as_subclass(PretendsCuda))


def test_what_is_built_is_taken_and_GSDG_TRITON_0_is_not(instead, monkeypatch):
    module, G = instead(Built(RuntimeError())), torch.ones(3, 4).as_subclass(PretendsCuda)
    assert torch_kernels.kernels(G) is module
    assert torch_kernels.kernels(torch.ones(40, 4).as_subclass(PretendsCuda)) is module
    monkeypatch.setenv("GSDG_TRITON", "0")
    assert torch_kernels.kernels(G) is torch_kernels


@pytest.mark.skipif(HAS_GPU, reason="there is nothing missing")
def test_without_a_gpu_triton_itself_cannot_build(instead):
    """A real error of Triton, not a mock: no driver."""
    instead(triton_kernels)
    with pytest.raises(RuntimeError, match="active drivers"):
        triton_kernels.compile_kernels(3, torch.float32, torch.device("cpu"))
    assert torch_kernels.kernels(torch.ones(3, 4).as_subclass(PretendsCuda)) is torch_kernels


@pytest.mark.skipif(HAS_GPU, reason="with a GPU every other test compiles the kernels")
def test_build_compiles_what_a_step_launches(compiled, monkeypatch):
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
    for D, dtype in [(3, torch.float32), (5, torch.bfloat16), (8, torch.float64), (9, torch.float32)]:
        asked.clear()
        triton_kernels.compile_kernels(D, dtype, torch.device("cpu"))
        assert [len(re.findall(r"\.entry _(gram|combine)_\w*kernel", ptx)) for ptx in asked] == [1, 1], (D, dtype)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_builds_on_this_gpu(instead):
    instead(triton_kernels)
    assert torch_kernels.kernels(torch.ones(3, 4, device="cuda")) is triton_kernels
