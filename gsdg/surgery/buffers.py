"""The domains' gradients G [D, P] and the update [P] in memory, and what every parameter's `.grad` is meanwhile.

G and the update are flat: one parameter after the other. While a domain's backward pass runs, every `.grad` is a view
of that domain's row; afterwards the optimizer finds views of the update there. `.grad` always has the strides that
autograd itself would give it: those of its parameter, where that has no gaps in memory. A parameter whose rows (dim 0)
are scattered in memory, such as a transposed weight, therefore gets a `.grad` outside G, which is copied: a partition
cuts rows, so G holds them one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed
from torch import Tensor

from gsdg.errors import UserError
from gsdg.surgery.nonfinite import tensor_name

ALIGN = 16  # elements; every row of G begins on a cache line, as vector loads want it (2 CPU cores do not notice)


class GradientBuffers:
    """Buffers for the gradients of `params`, of one dtype on one device. dtype: of G, theirs or bfloat16."""

    def __init__(self, params: Sequence[Tensor], names: Sequence[str] | None, dtype: torch.dtype) -> None:
        self._params, self._names = params, names
        self.update = params[0].new_zeros(sum(p.numel() for p in params))
        self._update_views = self._views(self.update)
        self._scattered = {
            k: torch.zeros_like(p) for k, p in enumerate(params) if _is_dense(p) and not _rows_are_dense(p)
        }
        self._G = self.update.new_empty(0, len(self.update), dtype=dtype)
        self._row_views: list[list[Tensor]] = []
        self._reached = [False] * len(params)
        self._writes = 0  # to each .grad in the first domain's backward pass

    def rows(self, n_domains: int) -> Tensor:
        """[n_domains, P]: the first rows of G."""
        return self._G[:n_domains]

    @contextmanager
    def collecting(self, d: int, n_rows: int, domain: str) -> Iterator[None]:
        """Inside, one backward pass fills row d of G, which grows to `n_rows` rows if it has no row d yet.

        domain: its name, in words. UserError if something else than autograd took the place of a `.grad`.
        """
        grads = self._zeroed(d, n_rows)
        before = [grad._version for grad in grads]
        self._point(grads)
        yield
        self._check_grads(grads)
        # Autograd adds to a .grad in place, which raises its version: to see that, nothing waits for the device.
        writes = [grad._version - version for grad, version in zip(grads, before, strict=True)]
        self._check_writes(d, max(writes), domain)
        self._reached = [bool(n) or (d > 0 and reached) for n, reached in zip(writes, self._reached, strict=True)]
        self.clear()  # whatever runs between two domains cannot change a finished row
        self._store(d)

    def point_to_update(self) -> None:
        """Every `.grad` is the update; None, as after a plain backward pass, where no domain's loss reached."""
        for k, grad in self._scattered.items():
            grad.copy_(self._update_views[k])
        grads = enumerate(self._update_views)
        self._point([self._scattered.get(k, grad) if self._reached[k] else None for k, grad in grads])

    def clear(self) -> None:
        self._point([None] * len(self._params))

    def check_reached(self) -> None:
        """UserError if the backward passes of this step reached no parameter at all."""
        if not any(self._reached):
            raise UserError(
                f"no domain's loss depends on any of the {len(self._params)} parameters. Build the surgery on the "
                "parameters of the model that makes the losses, after the last of them was replaced"
            )

    def _point(self, grads: Sequence[Tensor | None]) -> None:
        for p, grad in zip(self._params, grads, strict=True):
            p.grad = grad

    def _zeroed(self, d: int, n_rows: int) -> list[Tensor]:
        """What collects domain d's gradients, zeroed: views of row d, or of the update where G is bfloat16."""
        if d >= len(self._G):
            size = len(self.update)
            G = self._G.new_empty(n_rows, -(-size // ALIGN) * ALIGN)[:, :size]
            G[:d] = self._G[:d]
            self._G = G
            self._row_views = [self._views(row) for row in G] if self._in_place else []
        (self._G[d] if self._in_place else self.update).zero_()
        for grad in self._scattered.values():
            grad.zero_()
        return [self._scattered.get(k, view) for k, view in enumerate(self._flat_views(d))]

    def _store(self, d: int) -> None:
        views = self._flat_views(d)
        for k, grad in self._scattered.items():
            views[k].copy_(grad)
        if not self._in_place:
            self._G[d].copy_(self.update)

    def _flat_views(self, d: int) -> list[Tensor]:
        return self._row_views[d] if self._in_place else self._update_views

    @property
    def _in_place(self) -> bool:
        """Whether autograd can write into the rows of G: a .grad has its parameter's type."""
        return self._G.dtype == self.update.dtype

    def _views(self, flat: Tensor) -> list[Tensor]:
        """flat [P] as the parameters' gradients, each with its parameter's strides where these keep rows in one piece.

        `.data`: views that count their own versions, where views of one tensor would share a count.
        """
        views = []
        for p, piece in zip(self._params, flat.split([p.numel() for p in self._params]), strict=True):
            keep = _is_dense(p) and _rows_are_dense(p)
            view = piece.as_strided(p.shape, p.stride(), piece.storage_offset()) if keep else piece.view(p.shape)
            views.append(view.data)
        return views

    def _check_grads(self, grads: Sequence[Tensor]) -> None:
        for k, (p, grad) in enumerate(zip(self._params, grads, strict=True)):
            if p.grad is not grad:
                name = tensor_name(k, [p.shape for p in self._params], self._names)
                raise UserError(
                    f"during the backward pass something put another tensor in the place of .grad of {name}; the "
                    "surgery never sees what is in it. DistributedDataParallel(gradient_as_bucket_view=True) does so: "
                    "leave that option out. So does a hook that steps an optimizer: step it after the surgery"
                )

    def _check_writes(self, d: int, writes: int, domain: str) -> None:
        """DistributedDataParallel writes to each .grad once more than autograd; in one pass, but not in all of them?"""
        if d == 0:
            self._writes = writes
        elif writes != self._writes and writes and self._writes and _distributed():
            raise UserError(
                f"DistributedDataParallel averaged the gradients of only some of the domains over the processes "
                f"({domain} is not like the first), and the replicas would drift apart. It averages once per forward "
                "pass: give a generator that makes one forward pass per domain, without shared_graph and no_sync()"
            )


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sorted_strides(p: Tensor) -> list[tuple[int, int]]:
    """(stride, length) of the dimensions longer than 1, the innermost first."""
    return sorted((p.stride(k), p.shape[k]) for k in range(p.ndim) if p.shape[k] > 1)


def _is_dense(p: Tensor) -> bool:
    """Whether the elements of p fill a piece of memory without gaps and overlaps."""
    size = 1
    for stride, length in _sorted_strides(p):
        if stride != size:
            return False
        size *= length
    return True


def _rows_are_dense(p: Tensor) -> bool:
    """Whether, in a p without gaps, dim 0 is outermost: contiguous or channels_last, say."""
    return p.ndim == 0 or p.shape[0] <= 1 or p.stride(0) * p.shape[0] == p.numel()
