"""The peak memory of training steps: ERM and GradSurgery, all gradients kept or in bfloat16, with micro-batches.

Peaks of torch.cuda.max_memory_allocated and max_memory_reserved over two steps, after two others, of the whole process:
network, Adam's state, images, activations, and G [D, P] of GradSurgery. GradSurgery should need 4 D P bytes more than
ERM for G (2 D P in bfloat16) and 4 P for the update, less what its smaller batches save in activations. cuDNN does not
try algorithms here, because a trial can take more memory than the step.
"""

from __future__ import annotations

from functools import partial

import torch
from timing import Row

from gpu_parts.measurement import Measurement, Setting, free_memory, peaks, ratio_column, row, start_peak
from gpu_parts.networks import DOMAINS, model_names, network, numerics, random_batches
from gsdg.algorithms import ERM, Algorithm, GradSurgery
from gsdg.surgery import Chunk, CorGrad

METHODS = {
    "erm": ERM,
    "grad_surgery": partial(GradSurgery, partition=Chunk(10), rule=CorGrad(), alpha=0.6),
    "grad_surgery storage=bf16": partial(GradSurgery, partition=Chunk(10), rule=CorGrad(), alpha=0.6, storage="bf16"),
}


def measurements(setting: Setting) -> list[Measurement]:
    """One measurement per network and precision."""
    cases = [(model, precision) for model in model_names(setting) for precision in ("float32", "bf16")]
    return [
        Measurement(f"{model} {precision}", 40, partial(_rows, model, precision, setting)) for model, precision in cases
    ]


def _rows(model: str, precision: str, setting: Setting, left: float) -> list[Row]:
    """The rows of each method, for whole batches and for pieces of 8 images; ratios are to ERM with whole batches."""
    rows: list[Row] = []
    sizes = (None, 1) if setting.tiny else (None, 8)
    for name, method in METHODS.items():
        for size in sizes:
            with numerics(precision, trial=False):
                measured = _peaks(method(), model, precision, size, setting)
            mode = f"micro_batch_size={size}" if size else "whole batches"
            rows.append(row(name, model=model, domains=DOMAINS, precision=precision, mode=mode, **measured))
    first = rows[0]["peak_mib"]
    return [
        own | {"ratio": ratio_column(own["peak_mib"], first), "ratio_to": "peak of erm, whole batches"} for own in rows
    ]


def _peaks(algorithm: Algorithm, model: str, precision: str, size: int | None, setting: Setting) -> dict[str, float]:
    """The columns of peak memory of one method. size: images per piece; None: whole batches."""
    free_memory(setting.device)
    batches = random_batches(setting)
    algorithm.setup(network(model, precision, setting), [batch.domain for batch in batches])
    algorithm.micro_batch_size = size
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=5e-5, fused=setting.device == "cuda")
    for step in range(4):
        if step == 2:
            start_peak(setting.device)
        optimizer.zero_grad(set_to_none=True)
        algorithm.backward(batches)
        algorithm.step(optimizer)
    return peaks(setting.device)
