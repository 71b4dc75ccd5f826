"""GradSurgery for anybody's loop: per-domain gradients at the cost of one ERM step, then partition x rule, then .grad.

    surgery = GradSurgery(model.named_parameters(), n_parts=10, alpha=0.6)
    for batches in loader:                             # one (images, labels) per domain
        losses = (cross_entropy(model(x), y) for x, y in batches)   # a generator: one forward alive at a time
        metrics = surgery.backward(losses)             # leaves the update in every .grad
        optimizer.step()

The gradients lie in one matrix G [D, P], allocated once: while domain d runs backward, every .grad is a view of row d.
A parameter that no domain's loss reaches has .grad None afterwards, as after a plain backward pass.
Method: ECAI 2024, see `rules/corgrad.py`. Weight decay and clipping belong after `backward`. With BatchNorm in train
mode each domain is normalised by its own statistics; with frozen BN, GroupNorm or LayerNorm the domains' gradients add
up to those of one joint step exactly.

float16 autocast: give the scaler the losses through the surgery, which then needs no `scaler.scale`:

        surgery.backward(losses, scaler=scaler)        # torch.amp.GradScaler
        scaler.step(optimizer)                         # skips the step if a domain's gradient held inf or NaN
        scaler.update()                                # and lowers the scale

The rule sees the gradients unscaled, and .grad is scaled again, so that `scaler.unscale_` may come before clipping. A
step that the scaler skips is no step of `alpha_schedule`, and no rule remembers it.

DistributedDataParallel: works with its default options, if every loss has a forward pass of its own. It averages each
domain's gradient over the processes, so all processes make the same update. Rules that draw random numbers draw from
torch's default generators: seed these equally in all processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from typing import Literal

import torch
from torch import Tensor
from torch.amp import GradScaler

from gsdg.errors import UserError, check_literal, listing
from gsdg.surgery.buffers import GradientBuffers
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
from gsdg.surgery.parameters import Given, Parameters
from gsdg.surgery.partition import Chunk, Layers, Partition, PerElement
from gsdg.surgery.rules.base import ElementRule, Metrics, Reduction, Rule
from gsdg.surgery.rules.corgrad import CorGrad, Order, ProjectOn
from gsdg.surgery.rules.precision import GRAM_EPS

Storage = Literal["full", "bf16"]


class Surgery:
    """A partition, a rule and the norm-outlier stage on the gradients of `params`.

    params: parameters, or `model.named_parameters()`, of one dtype (float32 or float64) on one device; those without
    requires_grad are left out. Move the model to its device and memory format, and freeze what is to be frozen, first:
    a later change is refused. names: one per parameter, where params bring none; for messages, and for the
    granularities that go by names. outliers: off if not given. storage: "bf16" keeps G in half the memory
    (benchmarks/storage.py measures what it does to the update); for float32 parameters.

    step: updates made so far, an int; a 0-dim tensor on the device once a GradScaler was given on an accelerator, where
    the host does not know which steps are skipped.
    """

    def __init__(
        self,
        params: Given,
        partition: Partition,
        rule: Rule,
        *,
        outliers: NormOutliers | None = None,
        storage: Storage = "full",
        names: Sequence[str] | None = None,
    ) -> None:
        check_literal("storage", storage, Storage)
        self._parameters = Parameters(params, names)
        self.names, trained = self._parameters.names, self._parameters.trained
        self.shapes, like = [p.shape for p in trained], trained[0]
        _check_use(self.shapes, like.dtype, partition, storage)
        self.partition, self.rule = partition, rule
        self.outliers = NormOutliers(1.0) if outliers is None else outliers
        self.table, self._elements = None, None
        if isinstance(partition, PerElement):
            operated = [partition.operates_on(shape) for shape in self.shapes]
            sizes = [p.numel() for p in trained]
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
        self._buffers = GradientBuffers(trained, self.names, torch.bfloat16 if storage == "bf16" else like.dtype)
        self._update = self._buffers.update
        self._first_nonfinite = FirstNonFinite(like.device)
        self._n_domains, self._domains = 0, None
        self._reading_is_free = like.device.type == "cpu"  # elsewhere the host would wait for the device
        self._scale: Tensor | None = None  # the scaler's, 0-dim, during a `backward` that was given one
        self._finite: Tensor | None = None  # 0-dim bool: whether all gradients of that step are finite

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
        self,
        losses: Iterable[Tensor],
        domains: Sequence[str] | None = None,
        *,
        shared_graph: bool = False,
        scaler: GradScaler | None = None,
    ) -> dict[str, Tensor]:
        """Run each loss backward as it comes, operate on the gradients, and leave the update in every .grad.

        losses: D scalars, each of a graph of its own (or, with `shared_graph`, all of one), not scaled.
        A generator is asked for the next loss only when the last one's graph is gone. domains: their D names, for
        messages. scaler: scales the losses and .grad; where a gradient is not finite, .grad is NaN, at which
        `scaler.step` skips the step. What .grad held before is discarded.
        Returns the mean loss, unscaled, and the rule's metrics: 0-dim tensors on the device, so that nothing waits for
        it. After an error every .grad is None: an optimizer step would then change nothing.
        """
        try:
            self._scale = self._scale_of(scaler)
            mean_loss = self._accumulate(losses, domains, shared_graph, scaler)
            self.combine(self.gradients, domains)
            if self._scale is not None:
                self._scale_update()
        except BaseException:
            self._buffers.clear()
            raise
        finally:
            self._scale = None
        self._buffers.point_to_update()
        return {"loss": mean_loss, **self.metrics}

    @property
    def gradients(self) -> Tensor:
        """[D, P]: the gradients kept from the last `backward`."""
        return self._buffers.rows(self._n_domains)

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
        return {"step": int(self.step), "rule": self.rule.state_dict()}

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
        finite. Elsewhere: note where it came from, and return a 0-dim bool, whether all is. With a scaler: leave what
        is not finite to the scaler, which looks for it, and return the 0-dim bool."""
        if self._scale is not None:
            self._finite = squares.isfinite().all()
            return self._finite
        if not self._reading_is_free:
            return self._first_nonfinite.note(squares, tensors, self.step)
        if not squares.isfinite().all():
            raise NonFiniteGradient(
                describe_nonfinite(G, self.shapes, self.names, self._domains)
                or describe_overflow(squares, tensors, self.shapes, self.names, self._domains, squares.dtype)
            )
        return None

    def _accumulate(
        self,
        losses: Iterable[Tensor],
        domains: Sequence[str] | None,
        shared_graph: bool,
        scaler: GradScaler | None,
    ) -> Tensor:
        """Fill one row of G per loss, unscaled; returns the mean loss, 0-dim, unscaled."""
        self._parameters.check_unchanged()
        expected = len(domains) if domains is not None else len(losses) if isinstance(losses, Sized) else 0
        values = []
        for loss in losses:  # no enumerate: it would hold the last loss during the next forward
            d = len(values)
            _check_loss(loss, d, domains)
            values.append(loss.detach().reshape(()))
            with self._buffers.collecting(d, max(expected, d + 1), domain_name(d, domains)):
                _run_backward(loss if self._scale is None else scaler.scale(loss), d, domains, shared_graph)
            del loss
        if not values or (domains is not None and len(values) != len(domains)):
            wanted = "at least 1" if domains is None else f"{len(domains)}, one for each of {listing(domains)}"
            raise UserError(f"found {len(values)} losses; expected {wanted}")
        self._buffers.check_reached()
        self._n_domains, self._domains = len(values), domains
        if self._scale is not None:
            self.gradients.mul_(self._scale.reciprocal())
        return torch.stack(values).mean()

    def _scale_of(self, scaler: GradScaler | None) -> Tensor | None:
        """The factor by which a scaler multiplies losses now, 0-dim on the device; None without an enabled scaler."""
        if scaler is None or not scaler.is_enabled():
            return None
        return scaler.scale(torch.ones((), device=self._update.device))

    def _scale_update(self) -> None:
        """Scale the update as the scaler expects it; all NaN, and no step, where a gradient was not finite."""
        self._update.mul_(torch.where(self._finite, self._scale, torch.nan))
        skipped = ~self._finite
        self.step = self.step - (int(skipped) if self._reading_is_free else skipped.long())

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
        params: Given,
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


def _check_use(shapes: Sequence[torch.Size], dtype: torch.dtype, partition: Partition, storage: Storage) -> None:
    """UserError where the partition or the storage is of no use for parameters of these shapes and this dtype."""
    if storage == "bf16" and dtype != torch.float32:
        raise UserError(
            f"storage='bf16' rounds the gradients to 8 bits, and the parameters are {dtype}; valid for float32 "
            "parameters only. Take storage='full'"
        )
    if not any(partition.operates_on(shape) for shape in shapes):
        raise UserError(
            f"layers='weights' operates on tensors of two dimensions or more, and none of the {len(shapes)} parameters "
            "is one; take layers='all'"
        )


def _check_loss(loss: Tensor, d: int, domains: Sequence[str] | None) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(
            f"the loss of {domain_name(d, domains)} is no scalar that requires grad (found {found}); "
            "give the reduced loss of that domain, not detached"
        )


def _run_backward(loss: Tensor, d: int, domains: Sequence[str] | None, shared_graph: bool) -> None:
    try:
        loss.backward(retain_graph=shared_graph)
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):  # torch has no class of its own for it
            raise
        raise UserError(
            f"the loss of {domain_name(d, domains)} shares its graph with a loss before it, which is freed by now. "
            "Give a generator that makes one forward pass per domain, or backward(losses, shared_graph=True)"
        ) from error
