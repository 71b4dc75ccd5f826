"""How far apart the distributions of several groups of features are: the mean of a distance over all pairs of groups.

    d(G_1, ..., G_k) = 2 / (k (k - 1))  sum_{i<j}  d(G_i, G_j)

Both distances are made of the inner products of all rows, [N, N], computed once: a group's own part does not come once
a pair, and no covariance [F, F] is ever formed. For two groups they are DomainBed's `mmd`, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsdg.errors import UserError


def gaussian_mmd(groups: Sequence[Tensor]) -> Tensor:
    """Of groups [n_i, F]: the squared MMD with the kernel sum_g exp(-g |x - y|^2), g = 0.001, 0.01, ..., 1000; 0-dim.

    The biased estimate: its means include k(x, x), which is constant.
    """
    rows = centred(groups)
    products = rows @ rows.T
    squares = products.diagonal()  # from the same products: every |x - x|^2 is 0 exactly, or large g would tell
    distances = (squares[:, None] + squares - 2 * products).clamp_min(0)  # [N, N]
    bandwidths = torch.logspace(-3, 3, 7, dtype=rows.dtype, device=rows.device)
    kernel = (distances[..., None] * -bandwidths).exp().sum(-1)  # powers of one exp are cheaper, and 4 digits worse
    return mean_embeddings(kernel, [len(group) for group in groups])


def moments(groups: Sequence[Tensor]) -> Tensor:
    """Of groups [n_i, F]: the mean square of the differences of their means [F] and of their covariances [F, F]; 0-dim.

    UserError for a group of one row, which has no covariance.
    """
    sizes = [len(group) for group in groups]
    if min(sizes) < 2:
        raise UserError("A covariance takes 2 images or more of each domain, found 1: raise trainer.batch_size.")
    parts = centred(groups).split(sizes)
    means = torch.stack([part.mean(0) for part in parts])
    scaled = [(part - mean) * (n / (n - 1)) ** 0.5 for part, mean, n in zip(parts, means, sizes, strict=True)]
    rows = torch.cat(scaled)  # those of a group have the second moment C_i: <C_i, C_j> = mean (x . y)^2
    covariances = mean_embeddings((rows @ rows.T).square(), sizes) / rows.shape[1] ** 2
    return 2 * means.var(0).mean() + covariances  # twice the variance is the mean over pairs of the squared difference


def centred(groups: Sequence[Tensor]) -> Tensor:
    """All rows [N, F] less their mean: distances stay as they are, and products lose no digits to a common offset."""
    rows = torch.cat(list(groups))
    return rows - rows.detach().mean(0)


def mean_embeddings(kernel: Tensor, sizes: Sequence[int]) -> Tensor:
    """kernel [N, N] of the rows of groups -> the mean over pairs of |mu_i - mu_j|^2, mu a group's mean embedding."""
    rows = torch.stack([block.mean(0) for block in kernel.split(sizes)])
    means = torch.stack([block.mean(1) for block in rows.split(sizes, dim=1)])  # [k, k] of <mu_i, mu_j>
    own, k = means.trace(), len(sizes)
    return 2 * (own / k - (means.sum() - own) / (k * (k - 1)))
