"""How long does the surgery take, against the released form and against reading memory?

    python benchmarks/surgery.py --output benchmarks/results/surgery_cpu_202611.csv

ResNet-50's parameter tensors (torchvision), D random gradients, the released rule (n_parts 10, alpha 0.6, all layers).
Contenders take turns in one process, on the same buffers; medians over the rounds:
- floor: the fastest plain-torch way found to read G twice and write the update once: torch.sum(G, 0, out=u), G.sum();
- surgery: `GradSurgery.combine`, and its three stages alone (grams, rule, combine);
- released form: the same rule written as loops over tensors, chunks and pairs with host-side ifs.
Targets: surgery <= 2.5 x floor, and >= 10 x faster than the released form, on 2 cores of a quiet machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from timing import medians, provenance, report
from torch import Tensor

from gsdg.surgery import GradSurgery
from gsdg.surgery.grams import combine, part_grams


def released_form(gradients: list[list[Tensor]], n_parts: int, alpha: float) -> list[Tensor]:
    """The rule of the release as loops: gradients[domain][tensor], changed in place -> one gradient a tensor."""
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


def timed_released_form(G: Tensor, shapes: list[torch.Size]) -> float:
    """Seconds of one call; it changes its gradients, and gets its copy of them outside the clock."""
    rows = [row.split([s.numel() for s in shapes]) for row in G.clone()]
    gradients = [[g.view(s) for g, s in zip(row, shapes, strict=True)] for row in rows]
    start = time.perf_counter()
    released_form(gradients, 10, 0.6)
    return time.perf_counter() - start


def floor(G: Tensor, update: Tensor) -> None:
    torch.sum(G, 0, out=update)
    G.sum()


def contenders(G: Tensor, shapes: list[torch.Size]) -> dict[str, Callable[[], object]]:
    """Name -> one call."""
    surgery = GradSurgery([torch.zeros(s, requires_grad=True) for s in shapes], n_parts=10, alpha=0.6)
    table, update = surgery.table, surgery.combine(G)  # the buffer that every call reuses
    grams = part_grams(G, table)
    weights, _ = surgery.rule.weights(grams, table, step=0, eps=1e-6)
    return {
        "floor": lambda: floor(G, update),
        "surgery": lambda: surgery.combine(G),
        "surgery: grams": lambda: part_grams(G, table),
        "surgery: rule": lambda: surgery.rule.weights(grams, table, step=0, eps=1e-6),
        "surgery: combine": lambda: combine(G, weights, table, update),
        "released form": lambda: timed_released_form(G, shapes),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=Path("benchmarks/results/surgery_cpu.csv"))
    options.add_argument("--rounds", type=int, default=21)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--domains", type=int, default=3)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    shapes = [p.shape for p in torchvision.models.resnet50().parameters()]
    G = torch.randn(args.domains, sum(s.numel() for s in shapes))
    times = medians(contenders(G, shapes), args.rounds)
    rows = [
        {
            "what": name,
            "median_ms": round(ms, 2),
            "ratio_to_floor": round(ms / times["floor"], 2),
            "faster_than_released": round(times["released form"] / ms, 2),
            **provenance("cpu"),
        }
        for name, ms in times.items()
    ]
    report(rows, args.output)


if __name__ == "__main__":
    main()
