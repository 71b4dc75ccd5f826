"""The three tolerances that keep rounding errors out of the rules. All are relative.

    gram_eps    the error of a Gram matrix: |error of <g_i, g_j>| <= gram_eps |g_i| |g_j|. In units of a cosine.
    rank_eps    the threshold of linear dependence: a squared length |sum_i c_i g_i|^2 counts as 0 if it is at most
                rank_eps (sum_i |c_i| |g_i|)^2. A share of the squared sum of the lengths.
    max_weight  the largest amplification: the weight of a gradient of length 1 where the exact weight is infinite.

gram_eps depends on the dtype of the gradients. A rule is given gram_eps and derives the other two from it. The lengths
are always those of the gradients in the inner product, never that of the longest gradient: the inner products of a
gradient 1,000 times shorter than the others have as many correct digits as the others.
"""

from __future__ import annotations

import torch

# 1e-6 instead of float32's 1.2e-7: an inner product of long gradients is a sum of many rounded products
GRAM_EPS = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-6}


def rank_eps(gram_eps: float) -> float:
    """gram_eps itself: the rounding error of c^T M c is at most gram_eps (sum_i |c_i| |g_i|)^2."""
    return gram_eps


def max_weight(gram_eps: float) -> float:
    """1 / sqrt(rank_eps): the weights that combine barely independent gradients into an update of length 1."""
    return rank_eps(gram_eps) ** -0.5
