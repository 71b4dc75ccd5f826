"""The time and memory of a bare training step of ERM and GradSurgery: nothing but gradients and Adam's update.

Three domains with 32 random images of 224 px each, in memory; networks with random weights and frozen BatchNorm. Images
per second are those of all domains together. cuDNN chooses its algorithms by trial, as in runs with
deterministic=false. The ratio is to ERM in the same precision, eager or compiled.

Precisions: float32 uses TF32 neither in matrix products nor in convolutions, tf32 uses it in both. bf16 and fp16 are
autocast of the featurizer, with a float32 head; fp16 has a GradScaler. Modes: eager; channels_last; compiled
(torch.compile of the featurizer); CUDA graph: ERM's whole step with a capturable Adam, a bound that has no launches.
The form of the published release (step.py) is measured in float32 and eager, the only form that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timing import Row, medians, seconds_per_call
from torch import nn

from gpu_parts.measurement import Measurement, Setting, Skipped, free_memory, peaks, ratio_column, row, start_peak
from gpu_parts.networks import DOMAINS, PRECISIONS, VIT, Network, model_names, network, numerics, random_batches
from gsdg.surgery import GradSurgery
from gsdg.types import Batch, join

ERM, SURGERY, RELEASED = "erm", "grad_surgery", "released form of the step"
EAGER, LAST, COMPILED, GRAPH = "eager", "channels_last", "compiled", "CUDA graph"
Case = tuple[str, str, str, str]  # method, model, precision, mode


def measurements(setting: Setting) -> list[Measurement]:
    """One measurement per method, model, precision and mode; compiled ones last, because compiling takes most time."""
    models, times = model_names(setting), {}
    cases = [case for model in models for case in _uncompiled(model)]
    order = ("bf16",) if setting.tiny else ("bf16", "tf32", "float32", "fp16")
    cases += [(method, m, precision, COMPILED) for precision in order for m in models for method in (ERM, SURGERY)]
    return [Measurement(_name(case), _seconds(case), partial(_rows, case, setting, times)) for case in cases]


def _seconds(case: Case) -> float:
    """The longest that a case should take."""
    return 120 if case[3] == COMPILED else 20


def _name(case: Case) -> str:
    method, *others = case
    return " ".join((*others, method))


def _uncompiled(model: str) -> list[Case]:
    cases = [(RELEASED, model, "float32", EAGER)]
    for precision in PRECISIONS:
        modes = [EAGER] if model == VIT else [EAGER, LAST]
        cases += [(method, model, precision, mode) for mode in modes for method in (ERM, SURGERY)]
        cases += [(ERM, model, precision, GRAPH)] if precision != "fp16" else []
    return sorted(cases, key=lambda case: case[0] == RELEASED)  # stable: the ratio of the released form needs ERM


def _rows(case: Case, setting: Setting, times: dict[Case, float], left: float) -> list[Row]:
    """The row of one case. times: milliseconds of the cases so far."""
    method, model, precision, mode = case
    if mode == COMPILED:
        torch._dynamo.reset()  # it keeps the earlier networks alive
        free_memory(setting.device)
    with numerics(precision):
        batches = random_batches(setting, channels_last=mode == LAST)
        step = step_of(method, network(model, precision, setting, channels_last=mode == LAST), batches, setting, mode)
        for _ in range(3):
            step()
        start_peak(setting.device)
        call = partial(seconds_per_call, step, 1 if setting.tiny else 5, setting.device)
        time = medians({method: call}, setting.rounds, setting.device)[method]
    times[case] = time.ms
    images = sum(len(batch.labels) for batch in batches)
    reference = EAGER if mode == GRAPH else mode
    head = {"model": model, "domains": DOMAINS, "precision": precision, "mode": mode}
    erm = times.get((ERM, model, precision, reference))
    ratio = {"ratio": ratio_column(time.ms, erm), "ratio_to": f"erm, {reference}"}
    measured = {"ms": time.ms, "images_per_s": 1e3 * images / time.ms, "rounds": time.rounds}
    memory = {} if mode == GRAPH else peaks(setting.device)  # replays allocate nothing that the peak would count
    return [row(method, **head, **measured, **memory, **ratio)]


def step_of(
    method: str, model: Network, batches: Sequence[Batch], setting: Setting, mode: str = EAGER
) -> Callable[[], object]:
    """A training step of this method: gradients, and Adam's update (fused on CUDA)."""
    if mode == COMPILED:
        model.featurizer.compile(backend="aot_eager" if setting.tiny else "inductor")
    on_gpu, fp16 = setting.device == "cuda", model.autocast == torch.float16
    capturable = {"capturable": True} if mode == GRAPH and on_gpu else {}
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-5, fused=on_gpu, **capturable)
    scaler = torch.amp.GradScaler(setting.device, enabled=fp16)
    backward = BACKWARD[method](model, batches, scaler)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        backward()
        scaler.step(optimizer)
        scaler.update()

    return graphed(step, setting.device) if mode == GRAPH else step


def _erm(model: nn.Module, batches: Sequence[Batch], scaler: torch.amp.GradScaler) -> Callable[[], None]:
    def backward() -> None:
        joint = join(batches)
        scaler.scale(F.cross_entropy(model(joint.images), joint.labels)).backward()

    return backward


def _grad_surgery(model: nn.Module, batches: Sequence[Batch], scaler: torch.amp.GradScaler) -> Callable[[], None]:
    surgery = GradSurgery(model.named_parameters(), n_parts=10, alpha=0.6)

    def backward() -> None:
        surgery.backward((F.cross_entropy(model(b.images), b.labels) for b in batches), scaler=scaler)

    return backward


def _released(model: nn.Module, batches: Sequence[Batch], scaler: torch.amp.GradScaler) -> Callable[[], object]:
    from step import Released  # benchmarks/step.py

    algorithm = Released()
    algorithm.setup(model, [batch.domain for batch in batches])
    return partial(algorithm.backward, batches)


BACKWARD = {ERM: _erm, SURGERY: _grad_surgery, RELEASED: _released}


def graphed(step: Callable[[], object], device: str) -> Callable[[], object]:
    """The step captured in a CUDA graph, after three ordinary steps on a side stream, as torch asks for."""
    if device != "cuda":
        raise Skipped("CUDA graphs need CUDA")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
