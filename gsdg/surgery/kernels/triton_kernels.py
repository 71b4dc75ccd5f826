"""The two passes over G [D, P] as Triton kernels: `torch_kernels.slot_grams` and `torch_kernels.combine` on CUDA.

One launch per pass and one program per slot, which walks over its slot in tiles. `PartLayout.sums` then sums the slots
of each part: two stages without atomics and in a fixed order, so that the same G gives the same bits on the same GPU.
No matrix product is used, hence no TF32, and nothing waits for the device. A kernel is compiled per D, dtype and tile
size only: strides and the layout of the parts are arguments.

For more than 8 domains the D (D + 1) / 2 sums of the Gram pass would not fit into registers. There a program computes
the inner products of one block of 8 rows with another, for each pair of blocks, and reads 16 rows; the combine pass
loops over the domains. D is an argument of these kernels, which are compiled once per dtype. They do the same
arithmetic per pair of domains, and per element. The Gram pass reads every row ceil(D / 8) + 1 times; most of that may
come from the cache, as the programs of a slot read the same rows. NOT MEASURED ON A GPU EITHER.

Roofline, on paper: NO GPU HAS MEASURED IT YET. s is the size of an element of G in bytes.

    pass       reads             writes       fused multiply-adds
    Gram       D P s             S D^2 4      P D (D + 1) / 2
    combine    D P s (+ K D 8)   P 4          P D

In float32 the lower bound of the time is (2 D P + P) * 4 bytes divided by the memory bandwidth. ResNet-50, D = 3:
P = 25,557,032, so 0.716 GB and 0.214 ms on an H100 (3.35 TB/s); with G in bfloat16 0.409 GB and 0.122 ms. The 230
million multiply-adds are 0.46 GFLOP, 7 microseconds at 67 TFLOP/s: both passes are memory-bound. Kernel launches per
step: these two, the few of `PartLayout.sums`, and those of the rule.

Why slots have 2^14 elements on an accelerator:
- With 10 chunks per tensor ResNet-50 has 2,911 slots, about 22 for each of the 132 multiprocessors of an H100, so that
  all are busy until shortly before the end.
- A float32 slot of three domains is 196 kB, 32 tiles, which amortises the constant work of a program.
- The Gram matrices of all slots are 105 kB.
- A float32 sum adds 32 products per lane before the partial sums of the lanes are added in a tree.
A slot may begin at any element, so that loads cannot be vectors of 16 bytes: 32 adjacent lanes load 128 bytes of
float32 at once, and the loads of all rows of a tile are issued before the first product.

Needs Triton 3.3 or later (torch 2.7): the loops carry a tuple of accumulators.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsdg.surgery.part_layout import PartLayout, Piece, build_layout
from gsdg.utils.errors import UserError

if not hasattr(tl, "tuple"):
    raise ImportError(f"triton {triton.__version__} has no tuples of tensors; 3.3 or later is needed (torch 2.7)")

BLOCK = 8  # domains: the 36 sums of one block still fit into registers, and the 64 of two blocks with tiles of 128
BLOCK_TILE = 128  # elements, one per lane; ptxas for an H100: 95 registers, 166 in float64, no spills
MAX_PROGRAMS = 2**31 - 1  # along the first axis of a CUDA grid
WARPS = 4


def compile_kernels(D: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile both kernels and their launchers for G [D, P] of this dtype, without launching them.

    Raises what Triton raises if it cannot.
    """
    layout = build_layout([Piece(0, 0, 0, 1)], 1, 1, [0], device)
    G = torch.zeros(D, 1, dtype=dtype, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    places, finite = (layout.slot_start, layout.slot_length), G.new_ones((), dtype=torch.bool)
    slots, update = G.new_empty(1, D, D, dtype=wide), G.new_empty(1, dtype=wide)
    weights = G.new_empty(1, D, dtype=torch.float64)
    gram, combine, D_argument = _kernels(D)
    calls = [
        (gram, (G, 1, *places, slots, *D_argument), _gram_sizes(D)),
        (combine, (G, weights, 1, 1, 1, finite, *places, layout.slot_part, update, *D_argument), _combine_sizes(D)),
    ]
    with torch.cuda.device_of(G):
        for kernel, args, sizes in calls:
            compiled = kernel.warmup(*args, grid=(1,), **sizes, num_warps=WARPS, enable_fp_fusion=False)
            compiled.run  # noqa: B018 - the first access builds the launcher, with a C compiler


def slot_grams(G: Tensor, layout: PartLayout) -> Tensor:
    """The Gram matrix of every slot of G [D, P]: [S, D, D] float32 (float64 for a float64 G).

    G: float32, bfloat16 or float64. Its rows have unit stride; there may be padding between them.
    """
    D = _checked(G, layout)
    slots = G.new_empty(layout.n_slots, D, D, dtype=torch.float64 if G.dtype == torch.float64 else torch.float32)
    places = layout.slot_start, layout.slot_length
    kernel, _, D_argument = _kernels(D)
    blocks = () if D <= BLOCK else (-(-D // BLOCK),) * 2
    _launch(kernel, layout, blocks, G, G.stride(0), *places, slots, *D_argument, **_gram_sizes(D))
    return slots


def combine(G: Tensor, weights: Tensor, layout: PartLayout, out: Tensor, finite: Tensor | None = None) -> Tensor:
    """Write out[p] = sum over d of weights[k, d] * G[d, p] for every element p of part k, and return out.

    Args and dtypes as for `torch_kernels.combine`; the rows of G have unit stride.
    """
    D = _checked(G, layout)
    places = layout.slot_start, layout.slot_length, layout.slot_part
    strides = G.stride(0), *weights.stride()
    _, kernel, D_argument = _kernels(D)
    _launch(kernel, layout, (), G, weights, *strides, finite, *places, out, *D_argument, **_combine_sizes(D))
    return out


def _checked(G: Tensor, layout: PartLayout) -> int:
    """D; UserError if there are no domains, or too many slots for the kernels."""
    if not len(G):
        raise UserError("gradients of 0 domains; the Triton kernels take 1 or more")
    if layout.n_slots > MAX_PROGRAMS:
        raise UserError(
            f"{layout.n_slots} slots; a CUDA grid has at most {MAX_PROGRAMS} programs. Use a coarser partition"
        )
    return len(G)


def _kernels(D: int) -> tuple[triton.JITFunction, triton.JITFunction, tuple[int, ...]]:
    """The kernels of the Gram pass and of the combine pass for D domains, and their last argument: D if it is one."""
    return (_gram_kernel, _combine_kernel, ()) if D <= BLOCK else (_gram_blocks_kernel, _combine_loop_kernel, (D,))


def _gram_sizes(D: int) -> dict[str, int]:
    return {"D": D, "TILE": _gram_tile(D)} if D <= BLOCK else {"BLOCK": BLOCK, "TILE": BLOCK_TILE}


def _combine_sizes(D: int) -> dict[str, int]:
    return {"D": D, "TILE": 512} if D <= BLOCK else {"TILE": 512}


def _launch(
    kernel: triton.JITFunction,
    layout: PartLayout,
    blocks: tuple[int, ...],
    G: Tensor,
    *args: Tensor | int | None,
    **sizes: int,
) -> None:
    """Launch one program per slot (and pair of blocks) on the device of G; by default Triton uses the current one."""
    if layout.n_slots:
        with torch.cuda.device_of(G):
            # The kernels write out every fused multiply-add. Without further fusion by the compiler the arithmetic is
            # the same in every version of Triton.
            kernel[(layout.n_slots, *blocks)](G, *args, **sizes, num_warps=WARPS, enable_fp_fusion=False)


def _gram_tile(D: int) -> int:
    """Elements per tile: 4 per lane if D (D + 1) / 2 accumulators per element leave registers for the loads, else 1.

    ptxas for an H100: 47 registers at D = 3, 70 at D = 4, 63 at D = 8. No register spills, also in float64 (126 at
    D = 4).
    """
    return 512 if D <= 4 else 128


# In the kernels every stride is converted to int64 before it is multiplied: Triton passes an int in 32 bits if it fits,
# and d * stride may not fit. Triton must not specialise on strides: a stride of 1 would become a constant, which has no
# dtype to convert.
# ty compares the generic types of tl.zeros and tl.sum, which are JITFunctions, with themselves, and finds them unequal.


@triton.jit(do_not_specialize=["row_stride"])
def _gram_kernel(G, row_stride, slot_start, slot_length, slots, D: tl.constexpr, TILE: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    length = tl.load(slot_length + slot)
    lanes = tl.load(slot_start + slot) + tl.arange(0, TILE)
    row_stride = row_stride.to(tl.int64)
    wide: tl.constexpr = slots.dtype.element_ty
    sums = ()  # of x_i * x_j for i <= j: one partial sum per lane
    for _ in tl.static_range(D * (D + 1) // 2):
        sums += (tl.zeros([TILE], wide),)  # ty: ignore[invalid-argument-type]
    for offset in range(0, length, TILE):
        inside = offset + tl.arange(0, TILE) < length
        x = ()
        for d in tl.static_range(D):
            x += (tl.load(G + d * row_stride + lanes + offset, mask=inside, other=0.0).to(wide),)
        added = ()
        for i in tl.static_range(D):
            for j in tl.static_range(i, D):
                added += (tl.fma(x[i], x[j], sums[len(added)]),)
        sums = added
    done = ()
    for i in tl.static_range(D):
        for j in tl.static_range(i, D):
            inner = tl.sum(sums[len(done)], 0)  # ty: ignore[invalid-argument-type]
            done += (inner,)
            tl.store(slots + (slot * D + i) * D + j, inner)
            tl.store(slots + (slot * D + j) * D + i, inner)


@triton.jit(do_not_specialize=["row_stride", "D"])
def _gram_blocks_kernel(G, row_stride, slot_start, slot_length, slots, D, BLOCK: tl.constexpr, TILE: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    first, second = tl.program_id(1).to(tl.int64) * BLOCK, tl.program_id(2).to(tl.int64) * BLOCK
    upper = first <= second  # the other half of the pairs of blocks is the same by symmetry
    length = tl.where(upper, tl.load(slot_length + slot), 0)
    lanes = tl.load(slot_start + slot) + tl.arange(0, TILE)
    row_stride, D = row_stride.to(tl.int64), D.to(tl.int64)
    wide: tl.constexpr = slots.dtype.element_ty
    sums = ()  # of x_i * y_j: one partial sum per lane
    for _ in tl.static_range(BLOCK * BLOCK):
        sums += (tl.zeros([TILE], wide),)  # ty: ignore[invalid-argument-type]
    for offset in range(0, length, TILE):
        inside = offset + tl.arange(0, TILE) < length
        x = ()
        y = ()
        for i in tl.static_range(BLOCK):
            rows = G + lanes + offset
            x += (tl.load(rows + (first + i) * row_stride, mask=inside & (first + i < D), other=0.0).to(wide),)
            y += (tl.load(rows + (second + i) * row_stride, mask=inside & (second + i < D), other=0.0).to(wide),)
        added = ()
        for i in tl.static_range(BLOCK):
            for j in tl.static_range(BLOCK):
                added += (tl.fma(x[i], y[j], sums[len(added)]),)
        sums = added
    done = ()
    for i in tl.static_range(BLOCK):
        for j in tl.static_range(BLOCK):
            inner = tl.sum(sums[len(done)], 0)  # ty: ignore[invalid-argument-type]
            done += (inner,)
            both = upper & (first + i < D) & (second + j < D)
            tl.store(slots + (slot * D + first + i) * D + second + j, inner, mask=both)
            tl.store(slots + (slot * D + second + j) * D + first + i, inner, mask=both)


@triton.jit(do_not_specialize=["row_stride", "part_stride", "domain_stride"])
def _combine_kernel(
    G,
    weights,
    row_stride,
    part_stride,
    domain_stride,
    finite,
    slot_start,
    slot_length,
    slot_part,
    out,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    length = tl.load(slot_length + slot)
    lanes = tl.load(slot_start + slot) + tl.arange(0, TILE)
    row_stride = row_stride.to(tl.int64)
    wide: tl.constexpr = out.dtype.element_ty
    part = weights + tl.load(slot_part + slot) * part_stride
    w = ()
    for d in tl.static_range(D):
        w += (tl.load(part + d * domain_stride.to(tl.int64)).to(wide),)
    if finite is not None:
        keep = tl.load(finite)
    for offset in range(0, length, TILE):
        inside = offset + tl.arange(0, TILE) < length
        update = tl.zeros([TILE], wide)  # ty: ignore[invalid-argument-type]
        for d in tl.static_range(D):
            x = tl.load(G + d * row_stride + lanes + offset, mask=inside, other=0.0)
            update = tl.fma(x.to(wide), w[d], update)
        if finite is not None:
            update = tl.where(keep, update, 0.0)
        tl.store(out + lanes + offset, update, mask=inside)


@triton.jit(do_not_specialize=["row_stride", "part_stride", "domain_stride", "D"])
def _combine_loop_kernel(
    G,
    weights,
    row_stride,
    part_stride,
    domain_stride,
    finite,
    slot_start,
    slot_length,
    slot_part,
    out,
    D,
    TILE: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    length = tl.load(slot_length + slot)
    lanes = tl.load(slot_start + slot) + tl.arange(0, TILE)
    row_stride, domain_stride = row_stride.to(tl.int64), domain_stride.to(tl.int64)
    wide: tl.constexpr = out.dtype.element_ty
    part = weights + tl.load(slot_part + slot) * part_stride
    if finite is not None:
        keep = tl.load(finite)
    for offset in range(0, length, TILE):
        inside = offset + tl.arange(0, TILE) < length
        update = tl.zeros([TILE], wide)  # ty: ignore[invalid-argument-type]
        for d in range(D):
            x = tl.load(G + d * row_stride + lanes + offset, mask=inside, other=0.0)
            update = tl.fma(x.to(wide), tl.load(part + d * domain_stride).to(wide), update)
        if finite is not None:
            update = tl.where(keep, update, 0.0)
        tl.store(out + lanes + offset, update, mask=inside)
