"""One of two processes that train the same model by surgery under DistributedDataParallel, over gloo.

python replicas.py RANK STORE: for each case one line of JSON, {case, weights after three steps} or {case, error}.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gsdg.surgery import GradSurgery
from gsdg.utils.errors import UserError

WORLD, DOMAINS, STEPS = 2, 3, 3


class Model(nn.Module):
    """A linear layer that every domain uses, and one that only domain 1 of process 0 uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 3)]).double()

    def forward(self, x: torch.Tensor, deep: bool = False) -> torch.Tensor:
        x = self.layers[0](x)
        return self.layers[1](x) if deep else x


def inputs(rank: int) -> torch.Tensor:
    return torch.randn(DOMAINS, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1 + rank))


def losses(model: nn.Module, rank: int, deep: tuple[int, int] | None = None) -> Iterator[torch.Tensor]:
    """deep: the (process, domain) that uses the second layer."""
    for d, x in enumerate(inputs(rank)):
        yield (model(x, deep == (rank, d)) - d).square().mean()


def joint_losses(model: nn.Module, rank: int) -> list[torch.Tensor]:
    y = model(inputs(rank).flatten(0, 1)).unflatten(0, (DOMAINS, -1))
    return [(outputs - d).square().mean() for d, outputs in enumerate(y)]


def partly_averaged(model: DistributedDataParallel, rank: int) -> Iterator[torch.Tensor]:
    for d, x in enumerate(inputs(rank)):
        with model.no_sync() if d < DOMAINS - 1 else contextlib.nullcontext():
            yield (model(x) - d).square().mean()


def trained(case: str, rank: int) -> list[float]:
    """The weights after STEPS steps."""
    model = Model()
    options = {"gradient_as_bucket_view": case == "bucket view", "find_unused_parameters": case == "unused"}
    if case != "unused":
        model.layers[1].requires_grad_(False)
    replica = DistributedDataParallel(model, **options)
    surgery = GradSurgery(model.named_parameters(), n_parts=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        if case == "shared graph":
            surgery.backward(joint_losses(replica, rank), shared_graph=True)
        elif case == "no_sync":
            surgery.backward(partly_averaged(replica, rank))
        else:
            surgery.backward(losses(replica, rank, (0, 1) if case == "unused" else None))
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def main() -> None:
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    for case in ("default", "unused", "bucket view", "shared graph", "no_sync"):
        try:
            print(json.dumps({"case": case, "weights": trained(case, rank)}), flush=True)
        except UserError as error:
            print(json.dumps({"case": case, "error": str(error)}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
