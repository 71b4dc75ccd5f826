"""Shared by the tests of rules: every rule with settings that make it comparable, and families of gradients.

A family is a function (n_domains, seed) -> [D, P] float64 for tensors of the shapes SHAPES; `FAMILIES` names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gsdg.surgery import NormOutliers, PerElement, Surgery, WholeModel
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


def draw(n_domains: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[D, P]: domains share a direction and differ in scale, so that there are conflicts, agreements and outliers."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(n_domains, SIZE, generator=generator, dtype=torch.float64)
    G += 0.3 * torch.randn(SIZE, generator=generator, dtype=torch.float64)
    return (G * torch.linspace(0.5, 2, n_domains, dtype=torch.float64)[:, None]).to(dtype)


def zero_row(n_domains: int, seed: int) -> Tensor:
    G = draw(n_domains, seed)
    G[seed % n_domains] = 0
    return G


def opposite_pair(n_domains: int, seed: int) -> Tensor:
    G = draw(n_domains, seed)
    G[-1] = -G[0]
    return G


def rank_deficient(n_domains: int, seed: int) -> Tensor:
    """Every domain a combination of two directions."""
    directions = draw(2, seed)
    mix = torch.randn(n_domains, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mix @ directions


FAMILIES: dict[str, Callable[[int, int], Tensor]] = {
    "random": draw,
    "zero row": zero_row,
    "all zero": lambda n, seed: torch.zeros(n, SIZE, dtype=torch.float64),
    "identical rows": lambda n, seed: draw(1, seed).expand(n, -1).contiguous(),
    "opposite pair": opposite_pair,
    "rank deficient": rank_deficient,
    "no conflict": lambda n, seed: draw(n, seed).abs(),
    "orthogonal": lambda n, seed: torch.linalg.qr(draw(n, seed).T)[0].T.contiguous(),
    "tiny": lambda n, seed: 1e-15 * draw(n, seed),
    "huge": lambda n, seed: 1e15 * draw(n, seed),
    "one dominates": lambda n, seed: draw(n, seed) * torch.logspace(0, 8, n, dtype=torch.float64)[:, None],
}


def surgery_of(
    name: str, partition=None, dtype: torch.dtype = torch.float64, *, alpha: float = 1.0, device="cpu", **options
) -> Surgery:
    """The rule of this name, at the whole model or its only granularity, on parameters of SHAPES."""
    params = [torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for shape in SHAPES]
    partition = partition or (PerElement() if name in ELEMENT_RULES else WholeModel())
    return Surgery(params, partition, RULES[name](), outliers=NormOutliers(alpha), names=NAMES, **options)


def update_of(name: str, G: Tensor, partition=None, *, seed: int = 0, **options) -> Tensor:
    """[P]: the rule's first update; what it draws comes from `seed`."""
    torch.manual_seed(seed)
    return surgery_of(name, partition, G.dtype, **options).combine(G).clone()
