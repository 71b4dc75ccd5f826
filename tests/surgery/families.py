"""Shared by the tests of rules: every rule and partition with comparable settings, and families of gradients.

A family turns random gradients J [D, P, ...] (D domains, P elements) into gradients of one kind; `FAMILIES` names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gsdg.surgery import (
    Chunk,
    Groups,
    NormOutliers,
    Partition,
    PerElement,
    PerFilter,
    PerModule,
    PerTensor,
    Surgery,
    WholeModel,
)
from gsdg.surgery import rules as R

SHAPES = [torch.Size(shape) for shape in ((6, 5, 2), (6,), (7, 3), ())]
NAMES = ["conv.weight", "conv.bias", "head.weight", "scale"]
SIZE = sum(math.prod(shape) for shape in SHAPES)

GRAM_RULES: dict[str, Callable[[], R.GramRule]] = {
    "mean": R.Mean,
    "sum": R.Sum,
    "pcgrad": R.PCGrad,
    "gradvac": R.GradVac,
    "corgrad": R.CorGrad,
    "mgda": R.MGDA,
    "cagrad": R.CAGrad,
    "imtl_g": R.IMTLG,
    "aligned_mtl": R.AlignedMTL,
    "upgrad": R.UPGrad,
    "dualproj": R.DualProj,
    "nash": R.NashMTL,
}
ELEMENT_RULES: dict[str, Callable[[], R.ElementRule]] = {
    "agr_sum": R.AgrSum,
    "agr_rand": R.AgrRand,
    "and_mask": R.AndMask,
    "sand_mask": R.SandMask,
    "graddrop": R.GradDrop,
}
RULES = GRAM_RULES | ELEMENT_RULES
# settings that take another path than the default
VARIANTS = RULES | {
    "corgrad random": lambda: R.CorGrad(order="random", project_on="original", reduction="mean"),
    "cagrad c=3": lambda: R.CAGrad(c=3),
    "aligned_mtl median": lambda: R.AlignedMTL(scale_mode="median"),
    "aligned_mtl rmse": lambda: R.AlignedMTL(scale_mode="rmse"),
}
PARTITIONS: dict[str, Callable[..., Partition]] = {
    "model": WholeModel,
    "module": PerModule,
    "tensor": PerTensor,
    "chunk": partial(Chunk, 3),
    "filter": PerFilter,
    "groups": partial(Groups, ["conv.*"]),
    "element": PerElement,
}


def partitions_of(name: str) -> list[str]:
    """The partitions at which the rule of this name works."""
    if name in ELEMENT_RULES:
        return ["element"]
    return [partition for partition in PARTITIONS if partition != "element" or not VARIANTS[name]().per_part_state]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(n_domains: int, seed: int, dtype: torch.dtype = torch.float64, size: int = SIZE) -> Tensor:
    """[D, size]: domains share a direction and differ in scale: there are conflicts, agreements and outliers."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(n_domains, size, generator=generator, dtype=torch.float64)
    G += 0.3 * torch.randn(size, generator=generator, dtype=torch.float64)
    return (G * torch.linspace(0.5, 2, n_domains, dtype=torch.float64)[:, None]).to(dtype)


def with_row(J: Tensor, d: int, row: Tensor | float) -> Tensor:
    """J with another gradient of domain d."""
    J = J.clone()
    J[d] = row
    return J


def first_elements(J: Tensor, n: int) -> Tensor:
    """J with zeros after the first n elements."""
    J = J.clone()
    J[:, n:] = 0
    return J


def graded(J: Tensor, low: float, high: float) -> Tensor:
    """Lengths that grow from domain to domain, by 10^low to 10^high."""
    return J * torch.logspace(low, high, len(J), dtype=J.dtype).view(-1, *[1] * (J.ndim - 1))


def orthogonal(J: Tensor) -> Tensor:
    Q = torch.linalg.qr(J.movedim((0, 1), (-1, -2)))[0]  # [..., P, D]
    return Q.movedim((-1, -2), (0, 1)).contiguous()


FAMILIES: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda J: J,
    "dimension D": lambda J: first_elements(J, len(J)),
    "one element": lambda J: first_elements(J, 1),
    "two elements": lambda J: first_elements(J, 2),
    "rank deficient": lambda J: J[:, :1] * J[:1] + J[:, 1:2] * J[:1].flip(1),  # combinations of two directions
    "zero row": lambda J: with_row(J, 0, 0.0),
    "all zero": lambda J: 0 * J,
    "one row": lambda J: with_row(0 * J, 0, J[0]),
    "identical": lambda J: J[:1].expand_as(J).contiguous(),
    "identical pair": lambda J: with_row(J, -1, J[0]),
    "nearly identical": lambda J: J[:1] + 1e-3 * J,
    "opposite pair": lambda J: with_row(J, -1, -J[0]),
    "nearly opposite pair": lambda J: with_row(J, -1, -J[0] - 1e-4 * J[-1]),
    "hull holds zero": lambda J: J - J.mean(0),
    "no conflict": lambda J: J.abs(),
    "orthogonal": orthogonal,
    "axes": lambda J: torch.eye(*J.shape[:2], dtype=J.dtype).view(*J.shape[:2], *[1] * (J.ndim - 2)).expand_as(J),
    "tiny": lambda J: 1e-15 * J,
    "huge": lambda J: 1e15 * J,
    "graded": lambda J: graded(J, -4, 0),
    "graded, three elements": lambda J: graded(first_elements(J, 3), -4, 0),
    "one dominates": lambda J: graded(J, 0, 8),
}


def surgery_of(
    name: str, partition=None, dtype: torch.dtype = torch.float64, *, alpha: float = 1.0, device="cpu", **options
) -> Surgery:
    """A surgery with the rule of this name on parameters of SHAPES; partition None: `model`, or `element`."""
    params = [torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for shape in SHAPES]
    partition = partition or (PerElement() if name in ELEMENT_RULES else WholeModel())
    return Surgery(params, partition, VARIANTS[name](), outliers=NormOutliers(alpha), names=NAMES, **options)


def update_of(name: str, G: Tensor, partition=None, *, seed: int = 0, **options) -> Tensor:
    """[P]: the first update of the rule, with its random draws from `seed`."""
    torch.manual_seed(seed)
    return surgery_of(name, partition, G.dtype, **options).combine(G).clone()
