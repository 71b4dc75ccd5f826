"""Cost of a whole training step with GradSurgery, relative to ERM on the same batches.

    python benchmarks/step.py --output benchmarks/results/step_cpu.csv

ResNet-18 (random weights, frozen BatchNorm, linear head) and D x 32 images of 112 px in memory. A step computes the
gradients, the surgery and Adam's update. The contenders take turns in one process; the result is the median over the
rounds.

- erm: the images of all domains in one batch;
- gradients only: the micro-batch engine with a plain sum; its difference from grad_surgery is the cost of the surgery;
- grad_surgery: chunk(10) x corgrad, alpha 0.6; also with the joint engine, and with diagnostics at every step;
- released form of the step: clones every domain's gradient, then runs the loops of `surgery.py`.

Target: GradSurgery <= 1.15 x ERM on 2 cores of a quiet machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from surgery import released_form
from timing import medians, options, parsed, provenance, report

from gsdg.algorithms import ERM, Algorithm, GradSurgery
from gsdg.models import Classifier, resnet18
from gsdg.surgery import Chunk, CorGrad
from gsdg.types import Batch


class MicroBatches(ERM):
    """ERM's gradient, computed one domain after the other."""

    def backward(self, batches):
        for batch in batches:
            loss = F.cross_entropy(self.model(batch.images), batch.labels) / len(batches)
            loss.backward()
        return {"loss": loss.detach()}


class Released(ERM):
    """Per domain one forward, one backward and one copy of the gradients; then the rule as Python loops."""

    def backward(self, batches):
        params = [p for p in self.model.parameters() if p.requires_grad]
        gradients = []
        for batch in batches:
            self.model.zero_grad()
            loss = F.cross_entropy(self.model(batch.images), batch.labels)
            loss.backward()
            gradients.append([p.grad.clone() for p in params])
        for p, update in zip(params, released_form(gradients, 10, 0.6), strict=True):
            p.grad = update
        return {"loss": loss.detach()}


def algorithms() -> dict[str, Algorithm]:
    """The contenders by name."""
    method = partial(GradSurgery, partition=Chunk(10), rule=CorGrad(), alpha=0.6)
    return {
        "erm": ERM(),
        "gradients only": MicroBatches(),
        "grad_surgery": method(),
        "grad_surgery: engine joint": method(engine="joint"),
        "grad_surgery: diagnostics": method(diagnostics=True),
        "released form of the step": Released(),
    }


def network() -> Classifier:
    """The ResNet-18 of this benchmark, with the same weights at every call."""
    torch.manual_seed(0)
    return Classifier(
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


def random_batches(n_domains: int, device: str, layout: torch.memory_format = torch.contiguous_format) -> list[Batch]:
    """32 random images of 112 px per domain, with random labels."""
    pairs = [(torch.randn(32, 3, 112, 112), torch.randint(7, (32,))) for _ in range(n_domains)]
    return [
        Batch(images.to(device, memory_format=layout), labels.to(device), f"domain {d}")
        for d, (images, labels) in enumerate(pairs)
    ]


def step_of(algorithm: Algorithm, batches: list[Batch], device: str, layout: torch.memory_format) -> Callable[[], None]:
    """A training step of this algorithm on a network of its own."""
    model = network().to(device=device, memory_format=layout)
    algorithm.setup(model, [batch.domain for batch in batches])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        algorithm.backward(batches)
        optimizer.step()
        algorithm.diagnostics()

    return step


def main() -> None:
    parser = options(__doc__, "step.csv")
    parser.add_argument("--domains", type=int, default=3)
    parser.add_argument("--channels-last", action="store_true")
    args = parsed(parser)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    batches = random_batches(args.domains, args.device, layout)
    steps = {name: step_of(algorithm, batches, args.device, layout) for name, algorithm in algorithms().items()}
    times = medians(steps, args.rounds, args.device)
    rows = [
        {
            "what": name,
            "domains": args.domains,
            "layout": "channels_last" if args.channels_last else "contiguous",
            "median_ms": round(time.ms, 1),
            "rounds": time.rounds,
            "ratio_to_erm": round(time.ms / times["erm"].ms, 3),
            **provenance(args.device),
        }
        for name, time in times.items()
    ]
    report(rows, args.output)


if __name__ == "__main__":
    main()
