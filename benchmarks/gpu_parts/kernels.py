"""The two passes over the gradients G [D, P], as Triton kernels and as the torch functions that define them.

The floor is the time that the bytes of a pass take at the measured bandwidth of a copy from device to device, which
counts bytes read and written. The method reads G twice and writes the update once. `error` is ||x - x64|| / ||x64||;
the torch functions compute x64 from the same G in float64. `surgery` is the whole step, with the rule between the
passes. Times are those of calls in a row and include what their launches cost the host; the notes have the number of
launches and the time on the device (torch.profiler; 0 where the machine forbids profiling).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from surgery import ALPHA, Case, case_of, profiled
from timing import Row, Time, medians, seconds_per_call
from torch import Tensor

from gpu_parts.measurement import Measurement, Setting, row
from gsdg.surgery import Chunk, Surgery
from gsdg.surgery.kernels import torch_kernels
from gsdg.surgery.rules import CorGrad

MODELS = ("resnet18", "resnet50", "vit_b_16")  # of torchvision
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
COPIED = 2**30  # bytes, many times the L2 cache
AIMS = {"both passes, triton": "<= 1.5"}


class Contender(NamedTuple):
    """A call that moves at least `n_bytes` bytes."""

    call: Callable[[], object]
    n_bytes: int
    error: float | str = ""


def measurements(setting: Setting) -> list[Measurement]:
    """One measurement per model, number of domains and dtype of G."""
    models, domains = (("squeezenet1_1",), (3,)) if setting.tiny else (MODELS, (3, 5))
    cases = [(model, D, dtype) for model in models for D in domains for dtype in DTYPES]
    return [
        Measurement(f"{model} D={D} {dtype}", 40, partial(_rows, model, D, dtype, setting)) for model, D, dtype in cases
    ]


@torch.no_grad()
def _rows(model: str, D: int, dtype: str, setting: Setting, left: float) -> list[Row]:
    case = case_of(model, D, setting.device)
    G, count = _padded(case.G, DTYPES[dtype]), 2 if setting.tiny else 20
    contenders = {"copy": _copy(setting)}
    for path, passes in _paths(G).items():
        contenders |= _of_path(path, passes, case, G)
    calls = {name: partial(seconds_per_call, c.call, count, setting.device) for name, c in contenders.items()}
    times = medians(calls, setting.rounds, setting.device)
    bandwidth = contenders["copy"].n_bytes / times["copy"].ms  # bytes per ms
    head = {"model": model, "domains": D, "precision": dtype}
    rows = [_row(name, c, times[name], bandwidth, setting) | head for name, c in contenders.items()]
    missing = [] if "surgery, triton" in contenders else ["Triton's kernels cannot be built here: torch only"]
    return rows + [row("skipped", mode="triton", note=note) | head for note in missing]


def _padded(G: Tensor, dtype: torch.dtype) -> Tensor:
    """G [D, P] in this dtype, with rows as far apart as before: each begins at a cache line."""
    return torch.zeros(len(G), G.stride(0), dtype=dtype, device=G.device)[:, : G.shape[1]].copy_(G)


def _copy(setting: Setting) -> Contender:
    source = torch.randn((2**20 if setting.tiny else COPIED) // 4, device=setting.device)
    return Contender(partial(torch.empty_like(source).copy_, source), 2 * source.nbytes)


def _paths(G: Tensor) -> dict[str, ModuleType]:
    """The modules with the passes over G by name: torch, and triton if it can build its kernels here."""
    chosen = torch_kernels.kernels(G)
    return {"torch": torch_kernels} | ({} if chosen is torch_kernels else {"triton": chosen})


def _of_path(path: str, passes: ModuleType, case: Case, G: Tensor) -> dict[str, Contender]:
    """The contenders of one implementation of the passes: `what, path` -> contender."""
    surgery = case.surgery(Chunk(10), CorGrad(), ALPHA)
    layout, out = surgery.combiner.layout, torch.full_like(case.G[0], torch.nan)  # NaN stays where nothing is written
    weights = torch.rand(layout.n_parts, len(G), dtype=torch.float64, device=G.device)
    grams, update = partial(passes.slot_grams, G, layout), partial(passes.combine, G, weights, layout, out)
    read, written = len(G) * G[0].nbytes, out.nbytes
    exact, wide = G.double(), out.double()
    errors = (
        _distance(grams(), torch_kernels.slot_grams(exact, layout)),
        _distance(update(), torch_kernels.combine(exact, weights, layout, wide)),
    )
    return {
        f"slot_grams, {path}": Contender(grams, read, errors[0]),
        f"combine, {path}": Contender(update, read + written, errors[1]),
        f"both passes, {path}": Contender(lambda: (grams(), update()), 2 * read + written),
        f"surgery, {path}": Contender(partial(_on_path, path, surgery, G), 2 * read + written),
    }


def _on_path(path: str, surgery: Surgery, G: Tensor) -> Tensor:
    """The update, computed with the passes of this name."""
    os.environ["GSDG_TRITON"] = "1" if path == "triton" else "0"
    try:
        return surgery.combine(G)
    finally:
        del os.environ["GSDG_TRITON"]


def _distance(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def _row(name: str, contender: Contender, time: Time, bandwidth: float, setting: Setting) -> Row:
    """bandwidth: of the copy, in bytes per millisecond."""
    what, _, path = name.partition(", ")
    floor = contender.n_bytes / bandwidth
    note = f"{contender.n_bytes / time.ms / 1e6:.0f} GB/s"
    if not setting.tiny:
        launches, ms = profiled(contender.call)
        note += f"; {launches} launches, {ms:.4f} ms on the device"
    compared = {} if what == "copy" else {"floor_ms": floor, "ratio": time.ms / floor, "ratio_to": "floor"}
    aim, measured = AIMS.get(name, ""), {"ms": time.ms, "rounds": time.rounds, "error": contender.error}
    return row(what, mode=path, **measured, **compared, aim=aim, note=note)
