"""What does a whole training step cost with GradSurgery, against ERM on the same batches?

    python benchmarks/step.py --output benchmarks/results/step_cpu_202611.csv

ResNet-18 (random weights, frozen BatchNorm, linear head), D x 32 images of 112 px that are already in memory. A step is
gradients, surgery, Adam. Contenders take turns in one process; medians over the rounds. "gradients only" is the
micro-batch engine with a plain sum: what is left of the ratio is the surgery.
Target: GradSurgery <= 1.15 x ERM on 2 cores of a quiet machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import medians, provenance, report

from gsdg.algorithms import ERM, Algorithm, GradSurgery
from gsdg.batch import Batch
from gsdg.models import Classifier, resnet18


class MicroBatches(ERM):
    """ERM's gradient, one domain after the other."""

    def backward(self, batches):
        for batch in batches:
            loss = F.cross_entropy(self.model(batch.images), batch.labels) / len(batches)
            loss.backward()
        return {"loss": loss.detach()}


def step_of(algorithm: Algorithm, batches: list[Batch], channels_last: bool) -> Callable[[], None]:
    """One training step of this algorithm on its own copy of the network."""
    torch.manual_seed(0)
    model = Classifier(
        backbone=resnet18,
        classes=7,
        weights=None,
        freeze_bn=True,
        dropout=0.0,
        head="linear",
        image_size=112,
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
    )
    algorithm.setup(model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        algorithm.backward(batches)
        optimizer.step()

    return step


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=Path("benchmarks/results/step_cpu.csv"))
    options.add_argument("--rounds", type=int, default=11)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--domains", type=int, default=3)
    options.add_argument("--channels-last", action="store_true")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    shape = (32, 3, 112, 112)
    batches = [
        Batch(torch.randn(shape).to(memory_format=layout), torch.randint(7, (32,)), f"domain {d}")
        for d in range(args.domains)
    ]
    algorithms = {"erm": ERM(), "gradients only": MicroBatches(), "grad_surgery": GradSurgery()}
    steps = {name: step_of(algorithm, batches, args.channels_last) for name, algorithm in algorithms.items()}
    times = medians(steps, args.rounds)
    rows = [
        {
            "what": name,
            "layout": "channels_last" if args.channels_last else "contiguous",
            "median_ms": round(ms, 1),
            "ratio_to_erm": round(ms / times["erm"], 3),
            **provenance("cpu"),
        }
        for name, ms in times.items()
    ]
    report(rows, args.output)


if __name__ == "__main__":
    main()
