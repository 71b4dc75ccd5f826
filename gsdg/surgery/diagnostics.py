"""Gradient conflicts between domains, per module and granularity, from one pass over the gradients.

The Gram matrices of all rows [R, D, D] are computed once; the Gram matrices at every granularity from `filter` to
`model` are sums of them. Let cos = <g_i, g_j> / (||g_i|| ||g_j||) for each part and pair of domains. The statistics of
a module, over all of its parts, are:

    conflict_rate        share of pairs with cos < -gram_eps
    cosine               mean of cos, without pairs that have a zero gradient
    removed_norm_ratio   mean of |cos| over the conflicting pairs: the share of ||g_i|| that one projection would remove

The paper's figure of conflicts by depth is a plot of these statistics. The cosines of the whole model are also recorded
for each pair of domains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gsdg.surgery.kernels.torch_kernels import part_grams
from gsdg.surgery.part_layout import group_sums, members
from gsdg.surgery.partition import Chunk, PerFilter, PerModule, PerTensor, WholeModel, module_of, part_of_rows
from gsdg.surgery.rules.precision import GRAM_EPS
from gsdg.surgery.surgery import Surgery

STATISTICS = ["conflict_rate", "cosine", "removed_norm_ratio"]


class Level(NamedTuple):
    """One granularity: K parts in M modules."""

    part_rows: Tensor  # [K, m] int64: the rows of each part, padded
    module_parts: Tensor  # [M, m'] int64: the parts of each module, padded
    modules: list[str]


class Diagnostics:
    """Statistics of the domain gradients of a surgery's last `collect` or `backward`.

    n_parts: chunks per tensor at the granularity `chunk`.
    """

    def __init__(self, n_parts: int = 10) -> None:
        self.n_parts = n_parts
        self._levels: dict[str, Level] = {}

    @torch.no_grad()
    def __call__(self, surgery: Surgery) -> dict:
        """Compute the statistics of the surgery's `gradients`. Waits for the device, once per granularity.

        Returns: {"statistics": STATISTICS, "levels": {granularity: {module: [one number per statistic]}}, "domains":
            the D names, "cosine": the D x D cosines of the whole model, None where a gradient is zero}. The granularity
            `model` has one module, "model".
        """
        G = surgery.gradients
        if not self._levels:
            names = surgery.names or [str(tensor) for tensor in range(len(surgery.shapes))]
            self._tabulate(surgery.shapes, names, G.device)
        row_grams = part_grams(G, self._rows)  # [R, D, D]
        levels: dict[str, dict[str, list[float]]] = {}
        for name, level in self._levels.items():
            grams = group_sums(row_grams, level.part_rows)  # [K, D, D]
            values = statistics(grams, level.module_parts, GRAM_EPS[G.dtype]).tolist()
            levels[name] = {m: [round(v, 5) for v in row] for m, row in zip(level.modules, values, strict=True)}
        model = group_sums(row_grams, self._levels["model"].part_rows)[0]  # [D, D]
        return {
            "statistics": STATISTICS,
            "levels": levels,
            "domains": surgery.domains,
            "cosine": cosine_matrix(model),
        }

    def _tabulate(self, shapes: Sequence[torch.Size], names: Sequence[str], device: torch.device) -> None:
        """Find the rows of each part and the parts of each module, at every granularity."""
        self._rows = PerFilter().layout(shapes, device, names)
        module_of_row = part_of_rows(PerModule(), shapes, names)
        filled = [name for name, shape in zip(names, shapes, strict=True) if shape.numel()]
        modules = list(dict.fromkeys(module_of(name) for name in filled))
        granularities = {
            "filter": PerFilter(),
            "chunk": Chunk(self.n_parts),
            "tensor": PerTensor(),
            "module": PerModule(),
        }
        for name, partition in granularities.items():
            part_of_row = part_of_rows(partition, shapes, names)
            module_of_part = dict(zip(part_of_row, module_of_row, strict=True))
            n_parts = len(module_of_part)
            module_parts = members([module_of_part[part] for part in range(n_parts)], len(modules), device)
            self._levels[name] = Level(members(part_of_row, n_parts, device), module_parts, modules)
        all_rows = members(part_of_rows(WholeModel(), shapes, names), 1, device)
        self._levels["model"] = Level(all_rows, members([0], 1, device), ["model"])


def cosine_matrix(gram: Tensor) -> list[list[float | None]]:
    """The cosines of the D gradients with this Gram matrix [D, D], rounded; None where a gradient is zero."""
    lengths = gram.diagonal().clamp_min(0).sqrt()
    scale = lengths[:, None] * lengths
    cosines = (gram / scale).clamp(-1, 1).tolist()
    return [[round(c, 5) if math.isfinite(c) else None for c in row] for row in cosines]


def statistics(grams: Tensor, module_parts: Tensor, gram_eps: float) -> Tensor:
    """The STATISTICS [M, 3] of each module, from grams [K, D, D] and the parts of each module [M, m], padded with K."""
    D = grams.shape[1]
    lengths = grams.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()  # [K, D]
    scale = lengths.unsqueeze(2) * lengths.unsqueeze(1)  # [K, D, D]
    defined = (scale > 0).triu(1)  # each pair of domains once, where neither gradient is zero
    cosine = torch.where(defined, grams / scale, 0.0).clamp(-1, 1)
    conflict = cosine + gram_eps < 0
    removed = torch.where(conflict, -cosine, 0.0)
    part_sums = torch.stack([x.to(grams.dtype).sum((1, 2)) for x in (conflict, cosine, removed, defined)], dim=1)
    n_conflicts, cosines, removals, n_defined = group_sums(part_sums, module_parts).unbind(1)  # [M] each
    n_pairs = (module_parts < len(grams)).sum(1) * (D * (D - 1) / 2)
    conflict_rate = n_conflicts / n_pairs.clamp_min(1)
    return torch.stack((conflict_rate, cosines / n_defined.clamp_min(1), removals / n_conflicts.clamp_min(1)), dim=1)
