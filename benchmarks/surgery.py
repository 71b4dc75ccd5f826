"""Time of the surgery alone, compared with reading memory, the released form, textbook loops and TorchJD.

    python benchmarks/surgery.py --output benchmarks/results/surgery_cpu.csv
    python benchmarks/surgery.py --device cuda --output benchmarks/results/surgery_cuda.csv
    python benchmarks/surgery.py --rules-only --models resnet18 --domains 4 8 16 40 --threads 1 --rounds 1 \
        --only mean pcgrad gradvac corgrad mgda cagrad upgrad dualproj nash \
        --output benchmarks/results/rules_many_domains_cpu_202611.csv

Parameter tensors of ResNet-18, ResNet-50 and ViT-B/16 (torchvision), with random gradients of D = 3 and 5 domains. For
each, the contenders take turns in one process on the same gradients G; the result is the median over the rounds (at
least 3 rounds for slow contenders). A contender is named `rule @ partition`; rule(0.6) has the norm-outlier stage on,
with this alpha.

- floor: lower bound of the time, the fastest plain-torch way we know to read G twice and write the update once;
- corgrad(0.6) at every partition; on a G kept in bfloat16; and its three stages: slot_grams, sums and rule, combine;
- every Gram rule at chunk(10), every element-wise rule at element, TorchJD's four aggregators at model;
- released form: corgrad(0.6) @ chunk(10) as loops over tensors, chunks and pairs, with `if`s on the host;
- textbook pcgrad: the same kind of loops, one part per tensor;
- torchjd: TorchJD's aggregators on the whole [D, P] matrix, as its users call them;
- diagnostics: one call of Diagnostics() on kept gradients;
- with --rules-only: nothing but every Gram rule's D x D algebra, on random Gram matrices of the parts of chunk(10).

On CUDA a time includes the kernel launches, which a training step hides behind its backward pass. The lines after each
table give the time on the device (torch.profiler), the number of launches and the bandwidth.

Targets, on 2 CPU cores of an idle machine:
- corgrad(0.6) @ chunk(10): >= 10 x faster than the released form, <= 2.5 x the floor;
- no Gram rule takes more than 1.3 x mean @ chunk(10) for D = 3 (nash, cagrad: 2 x);
- the fastest TorchJD aggregator is not faster than our rules @ model.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torchvision
from timing import Row, Time, medians, options, parsed, provenance, save, show, timed
from torch import Tensor
from torch.autograd import DeviceType

from gsdg.surgery import (
    Chunk,
    Diagnostics,
    NormOutliers,
    Partition,
    PerElement,
    PerFilter,
    PerModule,
    PerTensor,
    Surgery,
    WholeModel,
    rules,
)
from gsdg.surgery.buffers import ALIGN
from gsdg.surgery.kernels.torch_kernels import kernels
from gsdg.surgery.rules import CorGrad, Rule
from gsdg.surgery.rules.precision import GRAM_EPS

Calls = dict[str, Callable[[], object]]

MODELS = ["resnet18", "resnet50", "vit_b_16"]
PARTITIONS = {"model": WholeModel, "module": PerModule, "tensor": PerTensor, "chunk(10)": Chunk, "filter": PerFilter}
GRAM_RULES = {
    "mean": rules.Mean,
    "sum": rules.Sum,
    "pcgrad": rules.PCGrad,
    "gradvac": rules.GradVac,
    "corgrad": rules.CorGrad,
    "mgda": rules.MGDA,
    "cagrad": rules.CAGrad,
    "imtl_g": rules.IMTLG,
    "aligned_mtl": rules.AlignedMTL,
    "upgrad": rules.UPGrad,
    "dualproj": rules.DualProj,
    "nash": rules.NashMTL,
}
ELEMENT_RULES = {
    "agr_sum": rules.AgrSum,
    "agr_rand": rules.AgrRand,
    "and_mask": rules.AndMask,
    "sand_mask": rules.SandMask,
    "graddrop": rules.GradDrop,
}
TORCHJD = {"PCGrad": {}, "UPGrad": {}, "MGDA": {}, "CAGrad": {"c": 0.5}}
ALPHA, OFF = NormOutliers(0.6), NormOutliers(1.0)
RELEASED, METHOD, MEAN = "released form @ chunk(10)", "corgrad(0.6) @ chunk(10)", "mean @ chunk(10)"


class Case(NamedTuple):
    """Random gradients for one model and number of domains."""

    names: list[str]
    params: list[Tensor]
    G: Tensor  # [D, P], rows padded to ALIGN elements as in the engine

    def surgery(self, partition: Partition, rule: Rule, outliers: NormOutliers = OFF) -> Surgery:
        return Surgery(self.params, partition, rule, outliers=outliers, names=self.names)

    @property
    def gradients(self) -> list[list[Tensor]]:
        """gradients[domain][tensor], views of G."""
        return split(self.G, self.params)


def case_of(model: str, n_domains: int, device: str) -> Case:
    with torch.device("meta"):
        named = dict(getattr(torchvision.models, model)().named_parameters())
    params = [torch.zeros(p.shape, device=device).requires_grad_() for p in named.values()]
    size = sum(p.numel() for p in params)
    torch.manual_seed(0)
    G = torch.randn(n_domains, -(-size // ALIGN) * ALIGN, device=device)[:, :size]
    return Case(list(named), params, G)


def split(G: Tensor, params: list[Tensor]) -> list[list[Tensor]]:
    """G [D, P] -> gradients[domain][tensor], views of G."""
    rows = [row.split([p.numel() for p in params]) for row in G]
    return [[g.view(p.shape) for g, p in zip(row, params, strict=True)] for row in rows]


def released_form(gradients: list[list[Tensor]], n_parts: int, alpha: float) -> list[Tensor]:
    """The release's rule as loops: gradients[domain][tensor], changed in place -> one gradient per tensor."""
    update = []
    removed = []
    for tensors in zip(*gradients, strict=True):
        for chunk in zip(*(g.chunk(n_parts) for g in tensors), strict=True):
            for i, g in enumerate(chunk):
                for p, other in enumerate(chunk):
                    if p == i:
                        continue
                    inner = torch.dot(g.flatten(), other.flatten())
                    if inner.item() < 0:
                        part = inner / other.norm() ** 2 * other
                        removed.append((part.norm() / g.norm()).item())
                        g.sub_(part)
        norms = torch.stack([g.norm() for g in tensors])
        mean, std = norms.mean(), norms.std(unbiased=False)
        outlier = [abs(n - mean).item() > std.item() for n in norms]
        mu = torch.stack([g for g, out in zip(tensors, outlier, strict=True) if not out]).mean(0)
        kept = [alpha * g + (1 - alpha) * mu if out else g for g, out in zip(tensors, outlier, strict=True)]
        update.append(torch.stack(kept).sum(0))
    return update


def timed_released_form(case: Case) -> float:
    """Seconds of one call. It changes its gradients in place, so it gets a copy, made before the clock starts."""
    gradients = split(case.G.clone(), case.params)
    return timed(lambda: released_form(gradients, 10, 0.6), case.G.device.type)


def textbook_pcgrad(gradients: list[list[Tensor]]) -> list[Tensor]:
    """PCGrad (arXiv 2001.06782) tensor by tensor: gradients[domain][tensor] -> one gradient per tensor."""
    update = []
    for tensors in zip(*gradients, strict=True):
        modified = [g.clone() for g in tensors]
        for i, g in enumerate(modified):
            for j in torch.randperm(len(tensors)).tolist():
                inner = torch.dot(g.flatten(), tensors[j].flatten())
                if j != i and inner.item() < 0:
                    g.sub_(inner / tensors[j].norm() ** 2 * tensors[j])
        update.append(torch.stack(modified).sum(0))
    return update


def floor(G: Tensor, update: Tensor) -> None:
    """Read G twice and write the update once: a lower bound of the surgery's time."""
    torch.sum(G, 0, out=update)
    G.sum()


def step_with_rule(surgery: Surgery, G: Tensor, rule: Rule, outliers: NormOutliers = OFF) -> Callable[[], object]:
    """A step of `rule` on a surgery that several rules share, with one table and one update buffer."""

    def call() -> None:
        surgery.combiner.rule, surgery.combiner.outliers = rule, outliers
        surgery.combine(G)

    return call


class Stages:
    """The three stages of a step, each timed alone.

    The middle stage is the whole step, with its two passes over G replaced by functions that return at once.
    """

    def __init__(self, surgery: Surgery, G: Tensor) -> None:
        self.surgery, self.G, self.passes = surgery, G, kernels(G)
        self.slots = self.passes.slot_grams(G, surgery.combiner.layout)
        self.update = surgery.combine(G)
        self.middle()  # sets self.weights

    def calls(self) -> Calls:
        return {"slot_grams": self.first, "sums and rule": self.middle, "combine": self.last}

    def first(self) -> None:
        self.passes.slot_grams(self.G, self.surgery.combiner.layout)

    def middle(self) -> float:
        with mock.patch("gsdg.surgery.partwise.kernels", self._no_passes):
            return timed(lambda: self.surgery.combine(self.G), self.G.device.type)

    def last(self) -> None:
        self.passes.combine(self.G, self.weights, self.surgery.combiner.layout, self.update)

    def _no_passes(self, *_: object) -> SimpleNamespace:
        return SimpleNamespace(slot_grams=lambda *_: self.slots, combine=self._keep_weights)

    def _keep_weights(self, G: Tensor, weights: Tensor, *others: object) -> None:
        self.weights = weights


def our_contenders(case: Case) -> Calls:
    """This project's contenders: name -> one call."""
    G, calls = case.G, {}
    surgeries = {name: case.surgery(partition(), CorGrad()) for name, partition in PARTITIONS.items()}
    for name, surgery in surgeries.items():
        calls[f"corgrad(0.6) @ {name}"] = step_with_rule(surgery, G, CorGrad(), ALPHA)
    calls["corgrad(0.6) @ element"] = partial(case.surgery(PerElement(), CorGrad(), ALPHA).combine, G)
    calls[f"{METHOD} bf16"] = step_with_rule(surgeries["chunk(10)"], G.bfloat16(), CorGrad(), ALPHA)
    calls |= Stages(case.surgery(Chunk(), CorGrad(), ALPHA), G).calls()
    for name, rule in GRAM_RULES.items():
        calls[f"{name} @ chunk(10)"] = step_with_rule(surgeries["chunk(10)"], G, rule())
    for name in (aggregator.lower() for aggregator in TORCHJD):
        calls[f"{name} @ model"] = step_with_rule(surgeries["model"], G, GRAM_RULES[name]())
    for name, rule in ELEMENT_RULES.items():
        calls[f"{name} @ element"] = partial(case.surgery(PerElement(), rule()).combine, G)
    # has the attributes of a surgery that Diagnostics reads, without a second copy of G
    kept = SimpleNamespace(gradients=G, names=case.names, shapes=[p.shape for p in case.params], domains=[])
    return calls | {"diagnostics": partial(Diagnostics(), kept)}


def torchjd_contenders(G: Tensor) -> Calls:
    """TorchJD's aggregators: name -> one call; prints which are skipped because a package is missing."""
    try:
        from torchjd import aggregation
    except ImportError as error:
        print(f"skipped: torchjd ({error})")
        return {}
    calls = {}
    for name, arguments in TORCHJD.items():
        try:
            calls[f"torchjd {name} @ model"] = partial(getattr(aggregation, name)(**arguments), G)
        except ImportError as error:
            print(f"skipped: torchjd {name} ({error})")
    return calls


def contenders(case: Case) -> Calls:
    """All contenders: name -> one call."""
    return {
        "floor": partial(floor, case.G, torch.zeros_like(case.G[0])),
        **our_contenders(case),
        RELEASED: partial(timed_released_form, case),
        "textbook pcgrad @ tensor": lambda: textbook_pcgrad(case.gradients),
        **torchjd_contenders(case.G),
    }


def profiled(call: Callable[[], object]) -> tuple[int, float]:
    """(number of kernels, copies and fills that one call launches on the GPU, their time there in milliseconds)."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    launched = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    return len(launched), sum(event.time_range.elapsed_us() for event in launched) / 1e3


def print_bandwidth(G: Tensor, calls: Calls, times: dict[str, Time]) -> None:
    """Print a line each for the floor, the two passes and the method; on a GPU with device times and launches."""
    n_bytes, D = G[0].numel() * G.element_size(), len(G)
    traffic = {"floor": (2 * D + 1) * n_bytes, "slot_grams": D * n_bytes, "combine": (D + 1) * n_bytes, METHOD: 0}
    for name in (name for name in traffic if name in calls):
        ms, columns = times[name].ms, [f"{name}: {times[name].ms:.3f} ms"]
        if G.is_cuda:
            launches, device_ms = profiled(calls[name])
            columns.append(f"{launches} launches, {device_ms:.3f} ms on the device")
            ms = device_ms or ms  # 0 where the machine forbids profiling
        if traffic[name]:
            columns.append(f"{traffic[name] / ms / 1e6:.1f} GB/s")
        print(", ".join(columns))


def measured(model: str, n_domains: int, only: list[str], rounds: int, device: str) -> list[Row]:
    """The rows for one model and number of domains."""
    print(f"{model}, {n_domains} domains", file=sys.stderr, flush=True)
    case = case_of(model, n_domains, device)
    calls = {name: call for name, call in contenders(case).items() if any(part in name for part in only)}
    times = medians(calls, rounds, device)
    print_bandwidth(case.G, calls, times)
    head = {"model": model, "P": case.G.shape[1], "domains": n_domains}
    return [{**head, **row_of(name, times), **provenance(device)} for name in calls]


def measured_rules(model: str, n_domains: int, only: list[str], rounds: int, device: str) -> list[Row]:
    """The rows of the Gram rules alone, without a pass over gradients; at least one call each."""
    print(f"{model}, {n_domains} domains, rules only", file=sys.stderr, flush=True)
    params = case_of(model, 1, "meta").params
    n_parts = Chunk().layout([p.shape for p in params]).n_parts
    J = torch.randn(n_domains, 100, n_parts, dtype=torch.float64, device=device)
    M = torch.stack([(row * J).sum(1) for row in J])  # [D, D, K]
    calls = {name: partial(algebra, rule(), M) for name, rule in GRAM_RULES.items() if any(x in name for x in only)}
    times = medians(calls, rounds, device)
    head = {"model": model, "parts": n_parts, "domains": n_domains}
    return [{**head, "what": name, "median_ms": round(times[name].ms, 3), **provenance(device)} for name in calls]


def algebra(rule: rules.GramRule, M: Tensor) -> None:
    rule.start_step(len(M))
    rule.coefficients(M, GRAM_EPS[torch.float32])


def row_of(name: str, times: dict[str, Time]) -> Row:
    """The columns of one contender. A ratio is empty if --only left out the contender that it compares with."""
    ms, missing = times[name].ms, Time(float("nan"), 0)
    ratios = {
        "ratio_to_floor": ms / times.get("floor", missing).ms,
        "ratio_to_mean": ms / times.get(MEAN, missing).ms,
        "faster_than_released": times.get(RELEASED, missing).ms / ms,
    }
    ratios = {key: "" if math.isnan(value) else round(value, 2) for key, value in ratios.items()}
    return {"what": name, "median_ms": round(ms, 3), "rounds": times[name].rounds, **ratios}


def main() -> None:
    parser = options(__doc__, "surgery.csv")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--domains", nargs="+", type=int, default=[3, 5])
    parser.add_argument("--only", nargs="+", default=[""], help="only contenders whose names contain one of these")
    parser.add_argument("--rules-only", action="store_true", help="only the D x D algebra of the Gram rules")
    args = parsed(parser)
    measure = measured_rules if args.rules_only else measured
    torch.set_grad_enabled(False)
    rows = []
    for model in args.models:
        for n_domains in args.domains:
            model_rows = measure(model, n_domains, args.only, args.rounds, args.device)
            gc.collect()
            show(model_rows)
            rows += model_rows
            save(rows, args.output)


if __name__ == "__main__":
    main()
