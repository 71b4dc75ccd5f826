"""Linear algebra on many small matrices at once, without reading a value on the host.

torch.linalg's solvers check for failure on the host, which waits for the device. Here the loops over D x D entries are
Python loops, and every operation is elementwise over the trailing dimensions. A matrix A is [n, n, ...]; a vector v is
[n, ...] with as many trailing dimensions as A, of equal size or 1. Tolerances assume matrices of trace 1: see
`normalised`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MOST_BY_SUBSETS = 8  # domains for which a rule tries every subset: 256 subsets; for more see `_active_set.py`
PIECE = 2**23  # elements of the largest intermediate tensor; 64 MB


def normalised(M: Tensor) -> Tensor:
    """The Gram matrices M [D, D, K], each divided by its trace; a matrix of trace 0 stays 0."""
    trace = M.diagonal().sum(-1)
    return M / torch.where(trace > 0, trace, 1.0)


def matvec(A: Tensor, v: Tensor) -> Tensor:
    """A v, [n, ...]."""
    return sum(A[:, j] * v[j] for j in range(len(A)))  # ty: ignore[invalid-explicit-return]  # not 0: n is at least 1


def quadratic(A: Tensor, v: Tensor) -> Tensor:
    """v^T A v, [...]."""
    return (v * matvec(A, v)).sum(0)


def cosines(M: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines [D, D, K] of the gradients with Gram matrices M [D, D, K], and 1 / |g_i| [D, K].

    Both are 0 for a gradient of length 0.
    """
    lengths = M.diagonal().t().sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    return M * inverse[:, None] * inverse, inverse


def exceeds_rounding(square: Tensor, c: Tensor, M: Tensor, rank_eps: float) -> Tensor:
    """Whether square = |sum_i c_i g_i|^2 exceeds its rounding error, and so counts as above 0: [S, K] bool.

    The rounding error is relative to the lengths of the gradients that are combined: short gradients have as many
    correct digits as long gradients.

    Args:
        square: [S, K]. c: [D, S, K]. M: [D, D, K].
    """
    lengths = M.diagonal().t().sqrt()[:, None]  # [D, 1, K]
    return square > rank_eps * (c.abs() * lengths).sum(0).square()


def solve(A: Tensor, b: Tensor, rank_eps: float) -> Tensor:
    """The x [n, ...] with A x = b, for symmetric positive semi-definite A; by elimination in the order of the rows.

    A pivot counts as 0 if it is at most rank_eps times the original diagonal entry, or below 1e-154, where its inverse
    would overflow. Its unknown is then 0. So, to leave an unknown out, set its row and column to 0.
    """
    n = len(A)
    threshold = (rank_eps * A.diagonal().movedim(-1, 0)).clamp_min(torch.finfo(A.dtype).tiny ** 0.5)
    A, x = A.clone(), b.clone()
    inverse = []
    for k in range(n):
        inverse.append(torch.where(A[k, k] > threshold[k], 1 / A[k, k], 0.0))
        factor = A[k + 1 :, k] * inverse[k]
        x[k + 1 :] -= factor * x[k]
        A[k + 1 :, k + 1 :] -= factor[:, None] * A[k, k + 1 :]
    for k in reversed(range(n)):
        x[k] = (x[k] - (A[k, k + 1 :] * x[k + 1 :]).sum(0)) * inverse[k]
    return x


def eigh(M: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues [D, K] of symmetric M [D, D, K], unsorted, and the eigenvectors as the columns of [D, D, K].

    Cyclic Jacobi rotations; 4 + D // 2 sweeps reach rounding error up to D = 12. If the lengths of the gradients differ
    much, small eigenvalues have as many correct digits as large eigenvalues (Demmel and Veselic, "Jacobi's method is
    more accurate than QR", SIAM J. Matrix Anal. Appl. 13, 1992).
    """
    D = len(M)
    eye = torch.eye(D, dtype=M.dtype, device=M.device).unsqueeze(-1).expand_as(M)
    both = torch.cat((M, eye))  # [2 D, D, K]: the matrix that becomes diagonal, above the product of the rotations
    for _ in range(4 + D // 2):
        for p in range(D):
            for q in range(p + 1, D):
                _rotate(both, p, q)
    return both[:D].diagonal().t(), both[D:]


def _rotate(both: Tensor, p: int, q: int) -> None:
    """Rotate the axes p and q in place such that the entry (p, q) becomes 0, if it exceeds rounding error."""
    # A rotation of mere rounding errors within a multiple eigenvalue would undo the work of other rotations.
    eps = torch.finfo(both.dtype).eps
    threshold = 16 * eps * (both[p, p] * both[q, q]).abs().sqrt()  # rounding error of the entry (p, q)
    gap, twice = both[q, q] - both[p, p], 2 * both[p, q]
    tangent = torch.where(gap < 0, -twice, twice) / (gap.abs() + torch.hypot(gap, twice))
    tangent = torch.where(twice.abs() > threshold, tangent, 0.0)
    cosine = torch.rsqrt(1 + tangent.square())
    sine = cosine * tangent
    first, second = both[:, p].clone(), both[:, q].clone()
    both[:, p], both[:, q] = cosine * first - sine * second, sine * first + cosine * second
    first, second = both[p].clone(), both[q].clone()
    both[p], both[q] = cosine * first - sine * second, sine * first + cosine * second


def subsets(n: int, device: torch.device) -> Tensor:
    """All subsets of n domains, as bool [n, 2^n, 1]: column s is the subset with the bits of s; column 0 is empty."""
    numbers, bits = torch.arange(2**n, device=device), torch.arange(n, device=device)
    return ((numbers >> bits[:, None]) & 1).bool().unsqueeze(-1)


def submatrix(mask: Tensor, A: Tensor) -> Tensor:
    """A [n, n, ...] with zeros in the rows and columns where mask [n, ...] is False."""
    return torch.where(mask[:, None] & mask, A, 0.0)


def lowest(candidates: Tensor, values: Tensor) -> Tensor:
    """The candidate [D, ...] with the lowest value, from candidates [D, S, ...] and their values [S, ...]."""
    index = values.argmin(0, keepdim=True)
    return candidates.gather(1, index.expand(len(candidates), *index.shape)).squeeze(1)


def by_subsets(n_domains: int) -> bool:
    """Whether a rule tries every subset of so many domains."""
    return n_domains <= MOST_BY_SUBSETS


def map_parts(weights: Callable[[Tensor], Tensor], M: Tensor, vectors: int = 1) -> Tensor:
    """weights(M), computed for limited numbers of parts at a time to bound the memory.

    Args:
        vectors: right-hand sides of length D. The largest intermediate tensor has, per part, 2^D x D x max(D, vectors)
            elements where the rule tries every subset, and D x D x vectors for more domains.
    """
    D = len(M)
    elements = 2**D * D * max(D, vectors) if by_subsets(D) else D * D * vectors
    size = max(1, PIECE // elements)
    return torch.cat([weights(piece) for piece in M.split(size, dim=-1)], dim=-1)
