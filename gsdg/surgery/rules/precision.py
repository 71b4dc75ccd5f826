"""The three small numbers that keep rounding errors out of the rules: what each means. All are relative.

    gram_eps    how exact a Gram matrix is: |error of <g_i, g_j>| <= gram_eps |g_i| |g_j|. The unit of a cosine.
    rank_eps    what counts as linearly dependent: a squared length |sum_i c_i g_i|^2 counts as 0 where it is at most
                rank_eps (sum_i |c_i| |g_i|)^2. A share of the squared lengths that it was summed from.
    max_weight  how far a rule may amplify: the largest weight of a gradient of length 1 where the exact weight is
                infinite, a number of gradients.

gram_eps follows from the type of the gradients. A rule is given gram_eps and takes the other two from it. The lengths
are those of the gradients in the inner product, never that of the longest domain: the inner products of a gradient
1,000 times shorter than the others have as many correct digits as theirs.
"""

from __future__ import annotations

import torch

# 1e-6 and not float32's 1.2e-7: an inner product of long gradients is a sum of many rounded products
GRAM_EPS = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-6}


def rank_eps(gram_eps: float) -> float:
    """gram_eps itself: the rounding error of c^T M c is at most gram_eps (sum_i |c_i| |g_i|)^2."""
    return gram_eps


def max_weight(gram_eps: float) -> float:
    """1 / sqrt(rank_eps): such weights make an update of length 1 of gradients that only just count as independent."""
    return rank_eps(gram_eps) ** -0.5
