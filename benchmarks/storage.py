"""How much does the update change when the gradients are kept in bfloat16?

    python benchmarks/storage.py --output benchmarks/results/storage.csv

ResNet-18 (random weights, frozen BatchNorm, linear head), 3 x 32 random images of 112 px, one backward per domain. Each
rule computes its update from the same gradients G twice: from G in float32 and from G rounded to bfloat16. Columns:

- trained: steps of ERM (Adam) on these images before; in an untrained network hardly any gradients conflict;
- relative_error: ||u_bf16 - u|| / ||u||; cosine: of u_bf16 and u;
- conflict_rate, conflict_rate_bf16: as the rule counts conflicts;
- flipped: number of (part, pair) that conflict in only one of the two G, as a share of those that conflict in float32;
- G_bytes, G_bytes_bf16: the memory of G.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from step import network, random_batches
from timing import Row, options, parsed, provenance, report
from torch import Tensor, nn

from gsdg.algorithms import ERM
from gsdg.surgery import Chunk, CorGrad, NormOutliers, Partition, PerTensor, Surgery, WholeModel
from gsdg.surgery.kernels.torch_kernels import part_grams
from gsdg.surgery.rules import MGDA, PCGrad, Rule
from gsdg.surgery.rules.precision import GRAM_EPS
from gsdg.types import Batch

TRAINED = 8  # steps
CONTENDERS = {
    "corgrad(0.6) @ chunk(10)": (Chunk(10), CorGrad(), 0.6),
    "pcgrad @ tensor": (PerTensor(), PCGrad(), 1.0),
    "mgda @ model": (WholeModel(), MGDA(), 1.0),
}


def train(model: nn.Module, batches: list[Batch], steps: int) -> None:
    """Train `model` in place with ERM and a new Adam."""
    algorithm, optimizer = ERM(), torch.optim.Adam(model.parameters(), lr=3e-4)
    algorithm.setup(model, [batch.domain for batch in batches])
    for _ in range(steps):
        optimizer.zero_grad()
        algorithm.backward(batches)
        optimizer.step()


def gradients(model: nn.Module, batches: list[Batch]) -> Tensor:
    """G [3, P], by one backward per domain."""
    surgery = Surgery(model.parameters(), Chunk(10), CorGrad())
    surgery.backward(F.cross_entropy(model(batch.images), batch.labels) for batch in batches)
    return surgery.gradients


@torch.no_grad()
def compared(model: nn.Module, G: Tensor, partition: Partition, rule: Rule, alpha: float) -> Row:
    """The columns that compare the rule's update from G with its update from G in bfloat16."""
    surgery = Surgery(model.parameters(), partition, rule, outliers=NormOutliers(alpha))
    low = G.bfloat16()
    (u, rate), (u_low, rate_low) = (updated(surgery, g) for g in (G, low))
    conflict, conflict_low = (conflicts(part_grams(g, surgery.combiner.layout), GRAM_EPS[g.dtype]) for g in (G, low))
    flipped = (conflict != conflict_low).sum() / conflict.sum().clamp_min(1)
    return {
        "relative_error": round(float((u_low - u).norm() / u.norm()), 6),
        "cosine": round(float(u @ u_low / (u.norm() * u_low.norm())), 8),
        "conflict_rate": round(rate, 5),
        "conflict_rate_bf16": round(rate_low, 5),
        "flipped": round(float(flipped), 5),
        "G_bytes": G.numel() * G.element_size(),
        "G_bytes_bf16": low.numel() * low.element_size(),
    }


def updated(surgery: Surgery, G: Tensor) -> tuple[Tensor, float]:
    """The update in float64 and the conflict rate; every call draws the same random order of pairs."""
    torch.manual_seed(0)
    return surgery.combine(G).double(), float(surgery.metrics["conflict_rate"])


def conflicts(grams: Tensor, eps: float) -> Tensor:
    """grams [K, D, D] -> bool [K, D, D]: whether the cosine of each pair of domains is below -eps."""
    lengths = grams.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    return grams < -eps * lengths.unsqueeze(2) * lengths.unsqueeze(1)


def main() -> None:
    args = parsed(options(__doc__, "storage.csv", rounds=None))
    model, batches = network().to(args.device), random_batches(3, args.device)
    rows = []
    for trained in (0, TRAINED):
        train(model, batches, trained)
        G = gradients(model, batches)
        for name, contender in CONTENDERS.items():
            rows.append({"what": name, "trained": trained, **compared(model, G, *contender), **provenance(args.device)})
    report(rows, args.output)


if __name__ == "__main__":
    main()
