"""How long does the surgery take, against the released form and against reading memory?

    python benchmarks/surgery.py --output benchmarks/results/surgery_cpu_202501.csv

ResNet-50's parameter tensors (torchvision), D random gradients, the released rule (n_parts 10, alpha 0.6, all layers).
Contenders, interleaved in one process, medians over the rounds:
- floor: the fastest plain-torch way found to read G twice and write the update once: torch.sum(G, 0, out=u), G.sum();
- surgery: `GradSurgery.combine`, and its three stages alone (grams, rule, combine);
- released form: the same rule written as loops over tensors, chunks and pairs with host-side ifs.
Targets: surgery <= 2.5 x floor, and >= 10 x faster than the released form, on 2 cores of a quiet machine.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torchvision
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


def floor(G: Tensor, update: Tensor) -> None:
    torch.sum(G, 0, out=update)
    G.sum()


def contenders(G: Tensor, shapes: list[torch.Size], n_parts: int, alpha: float) -> dict[str, Callable[[], object]]:
    """Name -> one call. The released form changes its gradients, so that it gets a fresh copy outside the clock."""
    surgery = GradSurgery([torch.zeros(s, requires_grad=True) for s in shapes], n_parts=n_parts, alpha=alpha)
    table, update = surgery.table, torch.empty(G.shape[1])
    grams = part_grams(G, table)
    weights, _ = surgery.rule.weights(grams, table, step=0, eps=1e-6)
    return {
        "floor": lambda: floor(G, update),
        "surgery": lambda: surgery.combine(G),
        "surgery: grams": lambda: part_grams(G, table),
        "surgery: rule": lambda: surgery.rule.weights(grams, table, step=0, eps=1e-6),
        "surgery: combine": lambda: combine(G, weights, table, update),
    }


def split(G: Tensor, shapes: list[torch.Size]) -> list[list[Tensor]]:
    return [[g.view(s) for g, s in zip(row.split([s.numel() for s in shapes]), shapes, strict=True)] for row in G]


def measure(calls: dict[str, Callable[[], object]], released: Callable[[], float], rounds: int) -> dict[str, float]:
    """Median milliseconds of each; every round runs every contender once."""
    seconds: dict[str, list[float]] = {name: [] for name in [*calls, "released form"]}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
        seconds["released form"].append(released())
    return {name: 1e3 * statistics.median(values[1:] or values) for name, values in seconds.items()}  # first: warm-up


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

    def released() -> float:
        gradients = split(G.clone(), shapes)
        start = time.perf_counter()
        released_form(gradients, 10, 0.6)
        return time.perf_counter() - start

    times = measure(contenders(G, shapes, 10, 0.6), released, args.rounds)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    rows = [
        {
            "what": name,
            "device": "cpu",
            "threads": args.threads,
            "median_ms": round(ms, 3),
            "ratio_to_floor": round(ms / times["floor"], 2),
            "speedup_over_released": round(times["released form"] / ms, 2),
            "torch": torch.__version__,
            "date": date.today().isoformat(),
            "commit": commit or "none",
        }
        for name, ms in times.items()
    ]
    for row in rows:
        print(
            "{what:18s} {median_ms:9.2f} ms {ratio_to_floor:7.2f} x floor {speedup_over_released:8.2f} x faster".format(
                **row
            )
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
