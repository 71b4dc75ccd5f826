"""GradSurgery for anybody's loop: per-domain gradients at the cost of one ERM step, then partition x rule, then .grad.

    surgery = GradSurgery(model.parameters(), n_parts=10, alpha=0.6)
    for batches in loader:                             # one (images, labels) a domain
        losses = (cross_entropy(model(x), y) for x, y in batches)   # a generator: one forward alive at a time
        metrics = surgery.backward(losses)             # leaves the update in every .grad
        optimizer.step()

The gradients lie in one matrix G [D, P], allocated once: while domain d runs backward, every .grad is a view of row d.
Method: ECAI 2024, see `rules/corgrad.py`. Weight decay and clipping belong after `backward`. With BatchNorm in train
mode each domain is normalised by its own statistics; with frozen BN, GroupNorm or LayerNorm the domains' gradients add
up to those of one joint step exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from typing import Literal

import torch
from torch import Tensor

from gsdg.errors import UserError, check_literal, listing
from gsdg.surgery.elements import Elements
from gsdg.surgery.grams import kernels
from gsdg.surgery.nonfinite import (
    FirstNonFinite,
    NonFiniteGradient,
    describe_nonfinite,
    describe_overflow,
    domain_name,
)
from gsdg.surgery.outliers import AlphaSchedule, NormOutliers, modified_squares
from gsdg.surgery.partition import Chunk, Layers, Partition, PerElement
from gsdg.surgery.rules.base import ElementRule, Metrics, Reduction, Rule
from gsdg.surgery.rules.corgrad import CorGrad, Order, ProjectOn
from gsdg.surgery.rules.precision import GRAM_EPS

Storage = Literal["full", "bf16"]

ALIGN = 16  # elements; every row of G begins on a cache line, as vector loads want it (2 CPU cores do not notice)


class Surgery:
    """A partition, a rule and the norm-outlier stage on the gradients of `params`.

    params: parameters of one dtype (float32 or float64) on one device; those without requires_grad are left out. Move
    the model to its device and memory format first. names: one a parameter, for messages and for the granularities
    that go by names. outliers: off if not given. storage: "bf16" keeps G in half the memory (benchmarks/storage.py
    measures what it does to the update).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        partition: Partition,
        rule: Rule,
        *,
        outliers: NormOutliers | None = None,
        storage: Storage = "full",
        names: Sequence[str] | None = None,
    ) -> None:
        check_literal("storage", storage, Storage)
        self._params, self.names = _trainable(list(params), names)
        self.shapes = [p.shape for p in self._params]
        like = self._params[0]
        self.partition, self.rule = partition, rule
        self.outliers = NormOutliers(1.0) if outliers is None else outliers
        self.table, self._elements = None, None
        if isinstance(partition, PerElement):
            operated = [partition.operates_on(shape) for shape in self.shapes]
            sizes = [p.numel() for p in self._params]
            self._elements = Elements(sizes, operated, rule, self.outliers, like.device)
        elif isinstance(rule, ElementRule):
            raise UserError(
                f"{type(rule).__name__} is an element-wise rule, and the partition is {type(partition).__name__}; "
                "valid: element (in a config, algorithm/partition=element)"
            )
        else:
            self.table = partition.table(self.shapes, like.device, self.names)
        self.step = 0
        self.metrics: Metrics = {}
        self._update = like.new_zeros(sum(p.numel() for p in self._params))
        self._update_views = self._views(self._update)
        self._G = like.new_empty(0, len(self._update), dtype=torch.bfloat16 if storage == "bf16" else like.dtype)
        self._row_views: list[list[Tensor]] = []
        self._first_nonfinite = FirstNonFinite(like.device)
        self._n_domains, self._domains = 0, None
        self._reading_is_free = like.device.type == "cpu"  # elsewhere the host would wait for the device

    @torch.no_grad()
    def combine(self, G: Tensor, domains: Sequence[str] | None = None) -> Tensor:
        """G [D, P], a domain's gradient a row, in parameter order -> the update [P], in a buffer every call reuses.

        If G holds NaN or inf: on a CPU, raises NonFiniteGradient and writes nothing. On an accelerator that would stall
        the queue; there the update is all zeros, and `first_nonfinite` says later where it came from.
        """
        self._check(G)
        G = G if G.stride(1) == 1 else G.contiguous()
        self._domains = domains
        self.rule.start_step(len(G))
        combined = self._combine_elements if self.table is None else self._combine_parts
        self.metrics = combined(G, GRAM_EPS[G.dtype])
        self.step += 1
        return self._update

    def backward(
        self, losses: Iterable[Tensor], domains: Sequence[str] | None = None, *, shared_graph: bool = False
    ) -> dict[str, Tensor]:
        """Run each loss backward as it comes, operate on the gradients, and leave the update in every .grad.

        losses: D scalars, each of a graph of its own (or, with `shared_graph`, all of one).
        A generator is asked for the next loss only when the last one's graph is gone. domains: their D names, for
        messages. What .grad held before is discarded.
        Returns the mean loss and the rule's metrics: 0-dim tensors on the device, so that nothing waits for it.
        After an error every .grad is None: an optimizer step would then change nothing.
        """
        try:
            mean_loss = self._accumulate(losses, domains, shared_graph)
            self.combine(self.gradients, domains)
        except BaseException:
            self._point_grads([None] * len(self._params))
            raise
        self._point_grads(self._update_views)
        return {"loss": mean_loss, **self.metrics}

    @property
    def gradients(self) -> Tensor:
        """[D, P]: the gradients kept from the last `backward`."""
        return self._G[: self._n_domains]

    def find_nonfinite(self, G: Tensor | None = None, domains: Sequence[str] | None = None) -> str | None:
        """Which domain's gradient of which tensor holds NaN or inf, in words; None if all is finite.

        Looks at every value of G [D, P], or of the gradients kept from the last `backward`. Waits for the device.
        """
        if G is None:
            G, domains = self.gradients, domains or self._domains
        return describe_nonfinite(G, self.shapes, self.names, domains)

    def first_nonfinite(self) -> str | None:
        """Which gradient was the first to be replaced by zeros since the start, in words; None if none was."""
        return self._first_nonfinite.describe(self.shapes, self.names, self._domains)

    def state_dict(self) -> dict:
        return {"step": self.step, "rule": self.rule.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.step = int(state["step"])
        self.rule.load_state_dict(state["rule"])

    def _combine_parts(self, G: Tensor, gram_eps: float) -> Metrics:
        table, ops, D = self.table, kernels(G), len(G)
        slots = ops.slot_grams(G, table)  # [S, D, D]
        finite = self._noted(G, slots.diagonal(dim1=1, dim2=2), table.slot_tensor)
        grams = table.sums(slots)  # [K, D, D]
        M = grams[: table.n_operated].permute(1, 2, 0).contiguous()  # [D, D, K]
        if finite is not None:
            M = torch.where(finite, M, 0.0)  # what a rule remembers stays finite
        C, metrics = self.rule.coefficients(M, gram_eps)
        if not self.outliers.off:
            norms = table.unit_sums(modified_squares(C, M)).sqrt()  # [U, D]
            shares = self.outliers.shares(norms, self.step, gram_eps)[table.part_unit[: table.n_operated]]  # [K, D]
            C = C * shares.t().unsqueeze(1)
        reduced = 1 / D if self.rule.reduction == "mean" else 1.0
        plain = C.new_full((table.n_parts - table.n_operated, D), reduced)
        weights = torch.cat((C.sum(0).t(), plain))  # [K, D]
        ops.combine(G, weights, table, self._update, finite)
        return metrics

    def _combine_elements(self, G: Tensor, gram_eps: float) -> Metrics:
        finite = self._noted(G, self._elements.squares(G), self._elements.tensors)
        metrics = self._elements.combine(G, self._update, self.step, gram_eps)
        if finite is not None:
            self._update.masked_fill_(~finite, 0)
            metrics = {name: torch.where(finite, value, 0.0) for name, value in metrics.items()}
        return metrics

    def _noted(self, G: Tensor, squares: Tensor, tensors: Tensor) -> Tensor | None:
        """squares [S, D], squared norms of pieces of the gradients, and their tensors [S]. On a CPU: refuse what is not
        finite. Elsewhere: note where it came from, and return a 0-dim bool, whether all is."""
        if not self._reading_is_free:
            return self._first_nonfinite.note(squares, tensors, self.step)
        if not squares.isfinite().all():
            raise NonFiniteGradient(
                describe_nonfinite(G, self.shapes, self.names, self._domains)
                or describe_overflow(squares, tensors, self.shapes, self.names, self._domains, squares.dtype)
            )
        return None

    def _accumulate(self, losses: Iterable[Tensor], domains: Sequence[str] | None, shared_graph: bool) -> Tensor:
        """Fill one row of G a loss; returns the mean loss, 0-dim."""
        expected = len(domains) if domains is not None else len(losses) if isinstance(losses, Sized) else 0
        values = []
        for loss in losses:  # no enumerate: it would hold the last loss during the next forward
            d = len(values)
            _check_loss(loss, d, domains)
            self._point_grads(self._zeroed_row(d, max(expected, d + 1)))
            loss.backward(retain_graph=shared_graph)
            self._store(d)
            values.append(loss.detach().reshape(()))
            del loss
        if not values or (domains is not None and len(values) != len(domains)):
            wanted = "at least 1" if domains is None else f"{len(domains)}, one for each of {listing(domains)}"
            raise UserError(f"found {len(values)} losses; expected {wanted}")
        self._n_domains, self._domains = len(values), domains
        return torch.stack(values).mean()

    def _zeroed_row(self, d: int, n_rows: int) -> list[Tensor]:
        """The views that collect domain d's gradients, zeroed: row d itself, or the update where G is bf16.

        G grows to `n_rows` if it has no such row yet.
        """
        if d >= len(self._G):
            size = len(self._update)
            G = self._G.new_empty(n_rows, -(-size // ALIGN) * ALIGN)[:, :size]
            G[:d] = self._G[:d]
            self._G = G
            self._row_views = [self._views(row) for row in G] if self._in_place else []
        (self._G[d] if self._in_place else self._update).zero_()
        return self._row_views[d] if self._in_place else self._update_views

    @property
    def _in_place(self) -> bool:
        """Whether autograd can write into the rows of G: a .grad has its parameter's type."""
        return self._G.dtype == self._update.dtype

    def _store(self, d: int) -> None:
        if not self._in_place:
            self._G[d].copy_(self._update)

    def _views(self, flat: Tensor) -> list[Tensor]:
        """flat [P] as the parameters' gradients, each in its parameter's layout where that keeps rows in one piece."""
        views = []
        for p, piece in zip(self._params, flat.split([p.numel() for p in self._params]), strict=True):
            keep = _rows_are_dense(p)
            views.append(piece.as_strided(p.shape, p.stride(), piece.storage_offset()) if keep else piece.view(p.shape))
        return views

    def _point_grads(self, grads: Sequence[Tensor | None]) -> None:
        for p, grad in zip(self._params, grads, strict=True):
            p.grad = grad

    def _check(self, G: Tensor) -> None:
        like = self._update
        right_type = G.dtype in (like.dtype, torch.bfloat16)
        if G.ndim != 2 or G.shape[1] != len(like) or len(G) < 1 or not right_type or G.device != like.device:
            raise UserError(
                f"G is {list(G.shape)} {G.dtype} on {G.device}; it must be [D, {len(like)}] {like.dtype} on "
                f"{like.device} (or bfloat16): one row a domain, its gradients flattened and concatenated in "
                "parameter order"
            )


class GradSurgery(Surgery):
    """The paper's method: `Chunk(n_parts)` x `CorGrad`, then `NormOutliers(alpha)`. The options are described there,
    the verbs in `Surgery`."""

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        n_parts: int = 10,
        alpha: float = 0.6,
        alpha_schedule: AlphaSchedule = "constant",
        total_steps: int | None = None,
        order: Order = "fixed",
        project_on: ProjectOn = "modified",
        reduction: Reduction = "sum",
        layers: Layers = "all",
        storage: Storage = "full",
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            params,
            Chunk(n_parts, layers=layers),
            CorGrad(order=order, project_on=project_on, reduction=reduction),
            outliers=NormOutliers(alpha, schedule=alpha_schedule, total_steps=total_steps),
            storage=storage,
            names=names,
        )


def _trainable(params: list[Tensor], names: Sequence[str] | None) -> tuple[list[Tensor], list[str] | None]:
    """The parameters to operate on, and their names, after the checks that spare a confusing failure later."""
    if names is not None and len(names) != len(params):
        raise UserError(f"found {len(names)} names for {len(params)} parameters; give one a parameter, or none at all")
    kept = [k for k, p in enumerate(params) if p.requires_grad]
    if not kept:
        raise UserError(f"found {len(params)} parameters, none of which requires grad; give at least one that does")
    if len({id(params[k]) for k in kept}) < len(kept):
        raise UserError("a parameter was given twice; give each once, as model.parameters() does")
    kinds = sorted({f"{params[k].dtype} on {params[k].device}" for k in kept})
    if len(kinds) > 1 or params[kept[0]].dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"the parameters are {listing(kinds)}; they must all be float32, or all float64, on one device "
            "(for bf16 keep float32 parameters and run the forward under torch.autocast)"
        )
    return [params[k] for k in kept], None if names is None else [names[k] for k in kept]


def _check_loss(loss: Tensor, d: int, domains: Sequence[str] | None) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(
            f"the loss of {domain_name(d, domains)} is no scalar that requires grad (found {found}); "
            "give the reduced loss of that domain, not detached"
        )


def _rows_are_dense(p: Tensor) -> bool:
    """Whether p fills its memory without gaps and with dim 0 outermost (contiguous, channels_last)."""
    size = 1
    for stride, length, _ in sorted((p.stride(k), p.shape[k], k) for k in range(p.ndim) if p.shape[k] > 1):
        if stride != size:
            return False
        size *= length
    return p.ndim == 0 or p.shape[0] <= 1 or p.stride(0) * p.shape[0] == p.numel()
