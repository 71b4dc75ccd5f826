"""The memory of the domain gradients G [D, P] and of the update [P], and the `.grad` of every parameter.

G and the update are flat: one parameter after the other. During the backward pass of domain d every `.grad` is a view
of row d of G; after the surgery every `.grad` is a view of the update.

`.grad` always has the strides that autograd would give it: those of its parameter, if the parameter has no gaps in
memory. Partitions cut tensors into rows (index 0), so that G must store the rows one after the other. A parameter whose
rows are scattered in memory, such as a transposed weight, therefore gets a `.grad` of its own outside G, which is
copied into G after the backward pass.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed
from torch import Tensor

from gsdg.surgery.nonfinite import tensor_name
from gsdg.utils.errors import UserError

ALIGN = 16  # elements; every row of G begins at a cache line, for vector loads (no measurable effect on 2 CPU cores)


class GradientBuffers:
    """Buffers for the gradients of `params`, which have one dtype and one device.

    Args:
        dtype: of G: the dtype of the parameters, or bfloat16.
    """

    def __init__(self, params: Sequence[Tensor], names: Sequence[str] | None, dtype: torch.dtype) -> None:
        self._params, self._names = params, names
        self.update = params[0].new_zeros(sum(p.numel() for p in params))
        self._update_views = self._views(self.update)
        # parameter number -> its .grad outside G, for parameters with rows scattered in memory
        self._scattered = {
            k: torch.zeros_like(p) for k, p in enumerate(params) if _is_dense(p) and not _rows_are_dense(p)
        }
        self._G = self.update.new_empty(0, len(self.update), dtype=dtype)
        self._row_views: list[list[Tensor]] = []
        self._reached = [False] * len(params)  # whether a loss of this step depends on the parameter
        self._writes = 0  # the largest number of writes to a .grad in the first domain's backward pass

    def rows(self, n_domains: int) -> Tensor:
        """The first n_domains rows of G: [n_domains, P]."""
        return self._G[:n_domains]

    @contextmanager
    def collecting(self, d: int, n_rows: int, domain: str) -> Generator[None]:
        """Context in which one backward pass fills row d of G.

        Args:
            n_rows: the number of rows that G is allocated with, if it has no row d yet.
            domain: how to name the domain in messages.
        Raises:
            UserError: if code other than autograd replaced a `.grad`.
        """
        grads = self._zeroed(d, n_rows)
        before = [grad._version for grad in grads]
        self._point(grads)
        yield
        self._check_grads(grads)
        # Autograd adds to .grad in place, which increments its version counter. Reading it needs no sync.
        writes = [grad._version - version for grad, version in zip(grads, before, strict=True)]
        self._check_writes(d, max(writes), domain)
        self._reached = [bool(n) or (d > 0 and reached) for n, reached in zip(writes, self._reached, strict=True)]
        self.clear()  # code that runs between two domains must not change a finished row
        self._store(d)

    def point_to_update(self) -> None:
        """Let every `.grad` be its part of the update; None, as after a plain backward pass, where no loss reached."""
        for k, grad in self._scattered.items():
            grad.copy_(self._update_views[k])
        grads = enumerate(self._update_views)
        self._point([self._scattered.get(k, grad) if self._reached[k] else None for k, grad in grads])

    def clear(self) -> None:
        """Set every `.grad` to None."""
        self._point([None] * len(self._params))

    def check_reached(self) -> None:
        """UserError if the backward passes of this step reached no parameter at all."""
        if not any(self._reached):
            raise UserError(
                f"no domain's loss depends on any of the {len(self._params)} parameters. Build the surgery on the "
                "parameters of the model that computes the losses, after the last change of its modules"
            )

    def _point(self, grads: Sequence[Tensor | None]) -> None:
        for p, grad in zip(self._params, grads, strict=True):
            p.grad = grad

    def _zeroed(self, d: int, n_rows: int) -> list[Tensor]:
        """The tensors that serve as `.grad` for domain d, zeroed: views of row d, or of the update if G is bfloat16."""
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
        """Copy into row d of G what autograd could not write there in place."""
        views = self._flat_views(d)
        for k, grad in self._scattered.items():
            views[k].copy_(grad)
        if not self._in_place:
            self._G[d].copy_(self.update)

    def _flat_views(self, d: int) -> list[Tensor]:
        return self._row_views[d] if self._in_place else self._update_views

    @property
    def _in_place(self) -> bool:
        """Whether autograd can write into the rows of G: `.grad` must have the dtype of its parameter."""
        return self._G.dtype == self.update.dtype

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Views of flat [P], one per parameter and of its shape; with its strides, if its rows are not scattered.

        `.data` gives every view its own version counter; other views of one tensor share a counter.
        """
        views = []
        for p, piece in zip(self._params, flat.split([p.numel() for p in self._params]), strict=True):
            same_strides = _is_dense(p) and _rows_are_dense(p)
            strides = (p.shape, p.stride(), piece.storage_offset())
            view = piece.as_strided(*strides) if same_strides else piece.view(p.shape)
            views.append(view.data)
        return views

    def _check_grads(self, grads: Sequence[Tensor]) -> None:
        for k, (p, grad) in enumerate(zip(self._params, grads, strict=True)):
            if p.grad is not grad:
                name = tensor_name(k, [p.shape for p in self._params], self._names)
                raise UserError(
                    f"during the backward pass .grad of {name} was replaced by another tensor, whose content the "
                    "surgery cannot see. DistributedDataParallel(gradient_as_bucket_view=True) does so: leave that "
                    "option out. So does a hook that steps an optimizer: step it after the surgery"
                )

    def _check_writes(self, d: int, writes: int, domain: str) -> None:
        """UserError if DistributedDataParallel averaged some of the domain gradients and not others.

        It writes to each `.grad` once more than autograd does, so that all passes must have equal numbers of writes.
        """
        if d == 0:
            self._writes = writes
        elif writes != self._writes and writes and self._writes and _distributed():
            raise UserError(
                f"DistributedDataParallel averaged the gradients of only some of the domains over the processes "
                f"({domain} differs from the first), and the replicas would drift apart. It averages once per forward "
                "pass: give a generator that makes one forward pass per domain, without shared_graph and no_sync()"
            )


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sorted_strides(p: Tensor) -> list[tuple[int, int]]:
    """(stride, length) of the dimensions longer than 1, innermost first."""
    return sorted((p.stride(k), p.shape[k]) for k in range(p.ndim) if p.shape[k] > 1)


def _is_dense(p: Tensor) -> bool:
    """Whether the elements of p fill one block of memory without gaps or overlaps."""
    size = 1
    for stride, length in _sorted_strides(p):
        if stride != size:
            return False
        size *= length
    return True


def _rows_are_dense(p: Tensor) -> bool:
    """Whether dim 0 of p, which has no gaps, is outermost in memory, as in contiguous and channels_last tensors."""
    return p.ndim == 0 or p.shape[0] <= 1 or p.stride(0) * p.shape[0] == p.numel()
