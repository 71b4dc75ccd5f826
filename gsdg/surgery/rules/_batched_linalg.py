"""Linear algebra for the small matrices of many parts at once, without a look at a value on the host.

torch.linalg's solvers check for failure on the host, which stops a CUDA stream. Here the D x D loops are Python's and
every operation is elementwise over the axes behind. A is [n, n, ...]; a vector v is [n, ...] with as many axes behind
as A has, of equal lengths or 1. All sizes are relative to matrices of trace 1: see `normalised`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gsdg.errors import UserError

MOST_DOMAINS = 8  # of rules that try every subset of the domains: 256 of them
PIECE = 2**23  # numbers in the largest intermediate tensor, 64 MB


def normalised(M: Tensor) -> Tensor:
    """M [D, D, K] -> every part's Gram matrix divided by its trace; one of trace 0 stays 0."""
    trace = M.diagonal().sum(-1)
    return M / torch.where(trace > 0, trace, 1.0)


def times(A: Tensor, v: Tensor) -> Tensor:
    """A v, [n, ...]."""
    return sum(A[:, j] * v[j] for j in range(len(A)))


def quadratic(A: Tensor, v: Tensor) -> Tensor:
    """v^T A v, [...]."""
    return (v * times(A, v)).sum(0)


def cosines(M: Tensor) -> tuple[Tensor, Tensor]:
    """M [D, D, K] -> the cosines of the gradients [D, D, K] and 1 / |g_i| [D, K]; 0 of a gradient of length 0."""
    lengths = M.diagonal().t().sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    return M * inverse[:, None] * inverse, inverse


def exceeds_rounding(square: Tensor, c: Tensor, M: Tensor, rank_eps: float) -> Tensor:
    """square [S, K] = |sum_i c_i g_i|^2, c [D, S, K], M [D, D, K] -> bool [S, K], whether it counts as above 0.

    Its rounding error is relative to the gradients that it is made of: a short one has as many digits as a long one.
    """
    lengths = M.diagonal().t().sqrt()[:, None]  # [D, 1, K]
    return square > rank_eps * (c.abs() * lengths).sum(0).square()


def solve(A: Tensor, b: Tensor, rank_eps: float) -> Tensor:
    """x [n, ...] with A x = b, A symmetric and positive semi-definite; by elimination in the order of the rows.

    A pivot of at most rank_eps times what stood there counts as 0, and so does one without a useful inverse (below
    1e-154). Its unknown is 0: to leave an unknown out, make its row and column 0.
    """
    n = len(A)
    floor = (rank_eps * A.diagonal().movedim(-1, 0)).clamp_min(torch.finfo(A.dtype).tiny ** 0.5)
    A, x = A.clone(), b.clone()
    inverse = []
    for k in range(n):
        inverse.append(torch.where(A[k, k] > floor[k], 1 / A[k, k], 0.0))
        factor = A[k + 1 :, k] * inverse[k]
        x[k + 1 :] -= factor * x[k]
        A[k + 1 :, k + 1 :] -= factor[:, None] * A[k, k + 1 :]
    for k in reversed(range(n)):
        x[k] = (x[k] - (A[k, k + 1 :] * x[k + 1 :]).sum(0)) * inverse[k]
    return x


def eigh(M: Tensor) -> tuple[Tensor, Tensor]:
    """M [D, D, K] symmetric -> eigenvalues [D, K] in no order, and in column j of [D, D, K] the j-th's eigenvector.

    Cyclic Jacobi rotations; so many sweeps reach rounding up to D = 12. Where the
    lengths of gradients differ much, small eigenvalues have as many correct digits as large ones (Demmel and Veselic,
    "Jacobi's method is more accurate than QR", SIAM J. Matrix Anal. Appl. 13, 1992).
    """
    D = len(M)
    eye = torch.eye(D, dtype=M.dtype, device=M.device).unsqueeze(-1).expand_as(M)
    both = torch.cat((M, eye))  # [2 D, D, K]: what becomes diagonal, above the product of the rotations
    for _ in range(4 + D // 2):
        for p in range(D):
            for q in range(p + 1, D):
                _rotate(both, p, q)
    return both[:D].diagonal().t(), both[D:]


def _rotate(both: Tensor, p: int, q: int) -> None:
    """In place: the rotation of axes p and q that makes the entry (p, q) 0, where that is more than rounding."""
    # rotations that only stir rounding errors within a multiple eigenvalue would undo the work of the others
    floor = 16 * torch.finfo(both.dtype).eps * (both[p, p] * both[q, q]).abs().sqrt()  # of the entry's two axes
    gap, twice = both[q, q] - both[p, p], 2 * both[p, q]
    tangent = torch.where(gap < 0, -twice, twice) / (gap.abs() + torch.hypot(gap, twice))
    tangent = torch.where(twice.abs() > floor, tangent, 0.0)
    cosine = torch.rsqrt(1 + tangent.square())
    sine = cosine * tangent
    first, second = both[:, p].clone(), both[:, q].clone()
    both[:, p], both[:, q] = cosine * first - sine * second, sine * first + cosine * second
    first, second = both[p].clone(), both[q].clone()
    both[p], both[q] = cosine * first - sine * second, sine * first + cosine * second


def subsets(n: int, device: torch.device) -> Tensor:
    """[n, 2^n, 1] bool: column s holds the subset with the bits of s; column 0 is the empty one."""
    numbers, bits = torch.arange(2**n, device=device), torch.arange(n, device=device)
    return ((numbers >> bits[:, None]) & 1).bool().unsqueeze(-1)


def within(mask: Tensor, A: Tensor) -> Tensor:
    """A [n, n, ...] with zeros in the rows and columns that mask [n, ...] leaves out."""
    return torch.where(mask[:, None] & mask, A, 0.0)


def best(candidates: Tensor, values: Tensor) -> Tensor:
    """candidates [D, S, ...] and their values [S, ...] -> the candidate of the lowest value, [D, ...]."""
    index = values.argmin(0, keepdim=True)
    return candidates.gather(1, index.expand(len(candidates), *index.shape)).squeeze(1)


def in_pieces(weights: Callable[[Tensor], Tensor], M: Tensor, vectors: int = 1) -> Tensor:
    """weights(M) for rules that try all subsets: so many parts at a time that D x D x 2^D x parts stay bounded.

    vectors: how many right-hand sides of length D there are for every subset.
    """
    D = len(M)
    size = max(1, PIECE // (2**D * D * max(D, vectors)))
    return torch.cat([weights(piece) for piece in M.split(size, dim=-1)], dim=-1)


def refuse_many(rule: str, n_domains: int) -> None:
    if n_domains > MOST_DOMAINS:
        raise UserError(
            f"{rule} tries all 2^D subsets of the D domains, and there are {n_domains} domains; "
            f"valid: 1 to {MOST_DOMAINS}. Use another rule"
        )
