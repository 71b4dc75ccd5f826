"""The two passes over G [D, P] as Triton kernels: the CUDA twins of `grams.slot_grams` and `grams.combine`.

One launch a pass, one program a slot; a program walks its slot in tiles. Parts are sums of slots, by `Table.sums`: two
stages, no atomics, no order left to chance, so the same G gives the same bits on the same GPU. No matrix product, hence
no TF32. Nothing waits for the device, and D, the type and the tile are all that a kernel is compiled for: strides are
arguments, and so is everything in the table.

Roofline, on paper: NO GPU HAS MEASURED IT YET. s is the size of an element of G.

    pass       reads             writes       fused multiply-adds
    Gram       D P s             S D^2 4      P D (D + 1) / 2
    combine    D P s (+ K D 8)   P 4          P D

In float32 the floor is (2 D P + P) * 4 bytes over the memory's bandwidth. ResNet-50, D = 3: P = 25,557,032, so 0.716 GB
and 0.214 ms on an H100 (3.35 TB/s); with G in bfloat16 0.409 GB and 0.122 ms. Its 230 million multiply-adds are 0.46
GFLOP, 7 microseconds at 67 TFLOP/s: both passes are bound by memory. Launches a step: these two, the handful of
`Table.sums`, and the rule's.

Why slots have 2^14 elements there: in 10 chunks a tensor ResNet-50 is 2,911 slots, some 22 for each of an H100's 132
processors, so that all are busy to near the end; a float32 slot of three domains is 196 kB, 32 tiles, which hides what
a program does once; the Gram matrices of all slots are 105 kB; and a float32 sum adds 32 products before the partial
sums of the lanes meet in a tree. A slot begins anywhere, so loads cannot be vectors of 16 bytes: 32 neighbouring lanes
load 128 bytes of float32 at once, and every row of a tile is under way before the first product.

Triton 3.3 or later (torch 2.7): a loop carries a tuple of accumulators.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsdg.errors import UserError
from gsdg.surgery.table import Piece, Table
from gsdg.surgery.table import build as build_table

if not hasattr(tl, "tuple"):
    raise ImportError(f"triton {triton.__version__} has no tuples of tensors; 3.3 or later is needed (torch 2.7)")

MAX_DOMAINS = 8  # 36 pairs: their accumulators still fit into registers
MAX_PROGRAMS = 2**31 - 1  # along a CUDA grid's first axis
WARPS = 4


def build(D: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile both kernels, and Triton's launchers of them, for G [D, P] of this dtype; launches neither.

    Raises whatever Triton raises where it cannot.
    """
    table = build_table([Piece(0, 0, 0, 1)], 1, 1, [0], device)
    G = torch.zeros(D, 1, dtype=dtype, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    places, finite = (table.slot_start, table.slot_length), G.new_ones((), dtype=torch.bool)
    slots, update = G.new_empty(1, D, D, dtype=wide), G.new_empty(1, dtype=wide)
    weights = G.new_empty(1, D, dtype=torch.float64)
    calls = [
        (_gram_kernel, _gram_tile(D), (G, 1, *places, slots)),
        (_combine_kernel, 512, (G, weights, 1, 1, 1, finite, *places, table.slot_part, update)),
    ]
    with torch.cuda.device_of(G):
        for kernel, tile, args in calls:
            compiled = kernel.warmup(*args, grid=(1,), D=D, TILE=tile, num_warps=WARPS, enable_fp_fusion=False)
            compiled.run  # noqa: B018 - the launcher, which a C compiler makes, is built when it is first asked for


def slot_grams(G: Tensor, table: Table) -> Tensor:
    """G [D, P] float32, bfloat16 or float64 -> [S, D, D], every slot's Gram matrix, float32 (float64 of float64).

    The rows of G have unit stride; there may be padding between them.
    """
    D = _checked(G, table)
    slots = G.new_empty(table.n_slots, D, D, dtype=torch.float64 if G.dtype == torch.float64 else torch.float32)
    places = table.slot_start, table.slot_length
    _launch(_gram_kernel, table, G, G.stride(0), *places, slots, D=D, TILE=_gram_tile(D))
    return slots


def combine(G: Tensor, weights: Tensor, table: Table, out: Tensor, finite: Tensor | None = None) -> Tensor:
    """out[p] = sum over d of weights[k, d] * G[d, p] for every element p of part k; weights [K, D], out [P].

    Computed in the type of `out`: float32 (float64 of a float64 G). finite: 0-dim bool on the device; where it is False
    all of `out` is 0, whatever G holds. Without it a NaN in G reaches `out` under any weight, zero included.
    """
    D = _checked(G, table)
    places = table.slot_start, table.slot_length, table.slot_part
    strides = G.stride(0), *weights.stride()
    _launch(_combine_kernel, table, G, weights, *strides, finite, *places, out, D=D, TILE=512)
    return out


def _checked(G: Tensor, table: Table) -> int:
    """D, where there are kernels for so many domains and slots."""
    if not 1 <= len(G) <= MAX_DOMAINS:
        raise UserError(
            f"gradients of {len(G)} domains; the Triton kernels take 1 to {MAX_DOMAINS}. "
            "Set GSDG_TRITON=0 for the torch path, which takes any number"
        )
    if table.n_slots > MAX_PROGRAMS:
        raise UserError(
            f"{table.n_slots} slots; a CUDA grid has at most {MAX_PROGRAMS} programs. Take a coarser partition"
        )
    return len(G)


def _launch(kernel: triton.JITFunction, table: Table, G: Tensor, *args: Tensor | int | None, **sizes: int) -> None:
    """One program a slot, on G's device: Triton itself takes the current one."""
    if table.n_slots:
        with torch.cuda.device_of(G):
            # every multiply-add is spelled out: the same arithmetic whatever this Triton would fuse of itself
            kernel[(table.n_slots,)](G, *args, **sizes, num_warps=WARPS, enable_fp_fusion=False)


def _gram_tile(D: int) -> int:
    """Elements: up to 4 a lane where D (D + 1) / 2 accumulators of each leave room for the loads, else 1.

    ptxas for an H100: 47 registers at D = 3, 70 at D = 4, 63 at D = 8; nothing spills, nor in float64 (126 at D = 4).
    """
    return 512 if D <= 4 else 128


# In the kernels: whatever multiplies a stride is int64. Triton passes an int as 32 bits where it fits, and d * stride
# may not fit. Strides are not specialised on: a stride of 1 would become a constant, without a type to widen.


@triton.jit(do_not_specialize=["row_stride"])
def _gram_kernel(G, row_stride, slot_start, slot_length, slots, D: tl.constexpr, TILE: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    length = tl.load(slot_length + slot)
    lanes = tl.load(slot_start + slot) + tl.arange(0, TILE)
    row_stride = row_stride.to(tl.int64)
    wide: tl.constexpr = slots.dtype.element_ty
    sums = ()  # of x_i * x_j, i <= j, a partial sum a lane
    for _ in tl.static_range(D * (D + 1) // 2):
        sums += (tl.zeros([TILE], wide),)
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
            inner = tl.sum(sums[len(done)], 0)
            done += (inner,)
            tl.store(slots + (slot * D + i) * D + j, inner)
            tl.store(slots + (slot * D + j) * D + i, inner)


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
        update = tl.zeros([TILE], wide)
        for d in tl.static_range(D):
            x = tl.load(G + d * row_stride + lanes + offset, mask=inside, other=0.0)
            update = tl.fma(x.to(wide), w[d], update)
        if finite is not None:
            update = tl.where(keep, update, 0.0)
        tl.store(out + lanes + offset, update, mask=inside)
