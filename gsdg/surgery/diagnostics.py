"""Where domains disagree: conflicts by module, at every granularity, from one pass over the gradients.

The row Gram matrices [R, D, D] are computed once; every granularity from `filter` up is a sum of them. Of each part and
pair of domains, cos = <g_i, g_j> / (||g_i|| ||g_j||):

    conflict_rate        share of the pairs with cos < -gram_eps
    cosine               mean of cos (pairs with a zero gradient left out)
    removed_norm_ratio   mean of |cos| over the conflicts: what projecting g_i off g_j once would remove of it

each over a module's parts. The paper's figure of conflicts by depth is a plot of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gsdg.surgery.grams import part_grams
from gsdg.surgery.partition import Chunk, PerFilter, PerModule, PerTensor, WholeModel, module_of, part_of_rows
from gsdg.surgery.rules.precision import GRAM_EPS
from gsdg.surgery.surgery import Surgery
from gsdg.surgery.table import group_sums, members

STATISTICS = ["conflict_rate", "cosine", "removed_norm_ratio"]


class Level(NamedTuple):
    """One granularity. parts [K, m]: the rows of each part; owners [M, m']: the parts of each module."""

    parts: Tensor
    owners: Tensor
    modules: list[str]


class Diagnostics:
    """Calling it looks at the gradients kept from a surgery's last `backward`. n_parts: of the granularity `chunk`."""

    def __init__(self, n_parts: int = 10) -> None:
        self.n_parts = n_parts
        self._levels: dict[str, Level] = {}

    @torch.no_grad()
    def __call__(self, surgery: Surgery) -> dict:
        """{"statistics": STATISTICS, "levels": {granularity: {module: [a value each]}}}, numbers on the host.

        At the granularity `model` the one module is called "model". Waits for the device, once a granularity.
        """
        G = surgery.gradients
        if not self._levels:
            names = surgery.names or [str(tensor) for tensor in range(len(surgery.shapes))]
            self._tabulate(surgery.shapes, names, G.device)
        rows = part_grams(G, self._rows)  # [R, D, D]
        found = {}
        for name, level in self._levels.items():
            values = statistics(group_sums(rows, level.parts), level.owners, GRAM_EPS[G.dtype])
            found[name] = {m: [round(v, 5) for v in row] for m, row in zip(level.modules, values.tolist(), strict=True)}
        return {"statistics": STATISTICS, "levels": found}

    def _tabulate(self, shapes: Sequence[torch.Size], names: Sequence[str], device: torch.device) -> None:
        self._rows = PerFilter().table(shapes, device, names)
        owner_of_row = part_of_rows(PerModule(), shapes, names)
        filled = [name for name, shape in zip(names, shapes, strict=True) if shape.numel()]
        modules = list(dict.fromkeys(module_of(name) for name in filled))
        granularities = {
            "filter": PerFilter(),
            "chunk": Chunk(self.n_parts),
            "tensor": PerTensor(),
            "module": PerModule(),
        }
        for name, partition in granularities.items():
            parts = part_of_rows(partition, shapes, names)
            owner_of = dict(zip(parts, owner_of_row, strict=True))  # part -> module
            owners = members([owner_of[part] for part in range(len(owner_of))], len(modules), device)
            self._levels[name] = Level(members(parts, len(owner_of), device), owners, modules)
        everything = part_of_rows(WholeModel(), shapes, names)
        self._levels["model"] = Level(members(everything, 1, device), members([0], 1, device), ["model"])


def statistics(grams: Tensor, owners: Tensor, gram_eps: float) -> Tensor:
    """grams [K, D, D], owners [M, m] -> [M, 3], the STATISTICS of each module's parts."""
    D = grams.shape[1]
    lengths = grams.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()  # [K, D]
    scale = lengths.unsqueeze(2) * lengths.unsqueeze(1)  # [K, D, D]
    alive = (scale > 0).triu(1)
    cosine = torch.where(alive, grams / scale, 0.0).clamp(-1, 1)
    conflict = cosine + gram_eps < 0
    removed = torch.where(conflict, -cosine, 0.0)
    counted = torch.stack([x.to(grams.dtype).sum((1, 2)) for x in (conflict, cosine, removed, alive)], dim=1)  # [K, 4]
    n_conflicts, cosines, removals, n_alive = group_sums(counted, owners).unbind(1)  # [M] each
    n_pairs = (owners < len(grams)).sum(1) * (D * (D - 1) / 2)
    return torch.stack(
        (n_conflicts / n_pairs.clamp_min(1), cosines / n_alive.clamp_min(1), removals / n_conflicts.clamp_min(1)), dim=1
    )
