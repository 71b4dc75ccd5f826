"""Distances between groups of feature vectors: the mean over all pairs of groups of a distance of two groups.

    d(G_1, ..., G_k) = 2 / (k (k - 1))  sum_{i<j}  d(G_i, G_j)

Both distances are computed from the inner products of all rows, [N, N], so that terms of a single group are computed
once and not once per pair, and no covariance matrix [F, F] is needed. For two groups they are equal to DomainBed's
`mmd`, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsdg.utils.errors import UserError


def gaussian_mmd(groups: Sequence[Tensor]) -> Tensor:
    """Squared MMD of groups [n_i, F] with the kernel sum_g exp(-g |x - y|^2), g = 0.001, 0.01, ..., 1000; 0-dim.

    This is the biased estimate: its means include k(x, x), which is constant.
    """
    rows = centred(groups)
    products = rows @ rows.T
    squares = products.diagonal()
    distances = (squares[:, None] + squares - 2 * products).clamp_min(0)  # [N, N]
    # |x - x|^2 is constant. Otherwise its gradients of size g would have to cancel, and float32 would lose 3 digits.
    distances = distances.masked_fill(torch.eye(len(rows), dtype=torch.bool, device=rows.device), 0)
    bandwidths = torch.logspace(-3, 3, 7, dtype=rows.dtype, device=rows.device)
    # Powers of a single exp would be cheaper, but less accurate by 4 digits.
    kernel = (distances[..., None] * -bandwidths).exp().sum(-1)
    return mean_embedding_distance(kernel, [len(group) for group in groups])


def moment_distance(groups: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the means [F] plus that of the covariances [F, F] of groups [n_i, F]; 0-dim.

    Raises:
        UserError: if a group has only one row, which has no covariance.
    """
    sizes = [len(group) for group in groups]
    if min(sizes) < 2:
        raise UserError("A covariance needs at least 2 images of each domain, found 1: raise trainer.batch_size.")
    parts = centred(groups).split(sizes)
    means = torch.stack([part.mean(0) for part in parts])
    # The second moment of the scaled rows of group i is its covariance C_i, and <C_i, C_j> is the mean of (x . y)^2.
    scaled = [(part - mean) * (n / (n - 1)) ** 0.5 for part, mean, n in zip(parts, means, sizes, strict=True)]
    rows = torch.cat(scaled)
    covariances = mean_embedding_distance((rows @ rows.T).square(), sizes) / rows.shape[1] ** 2
    # The mean squared difference over all pairs is twice the variance.
    return 2 * means.var(0).mean() + covariances


def centred(groups: Sequence[Tensor]) -> Tensor:
    """All rows [N, F] minus their mean: distances do not change, and a common offset costs no digits of products."""
    rows = torch.cat(list(groups))
    return rows - rows.detach().mean(0)


def mean_embedding_distance(kernel: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean over pairs of groups of |mu_i - mu_j|^2, where mu_i is the mean embedding of group i; 0-dim.

    Args:
        kernel: kernel values of all pairs of rows, [N, N].
        sizes: number of rows of each group, in order.
    """
    rows = torch.stack([block.mean(0) for block in kernel.split(sizes)])
    products = torch.stack([block.mean(1) for block in rows.split(sizes, dim=1)])  # [k, k], <mu_i, mu_j>
    squares, k = products.trace(), len(sizes)
    return 2 * (squares / k - (products.sum() - squares) / (k * (k - 1)))
