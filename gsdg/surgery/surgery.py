"""GradSurgery for any training loop: per-domain gradients at the cost of one ERM step, combined by partition and rule.

    surgery = GradSurgery(model.named_parameters(), n_parts=10, alpha=0.6)
    for batches in loader:                             # one (images, labels) per source domain
        losses = (cross_entropy(model(x), y) for x, y in batches)   # a generator: one forward pass alive at a time
        metrics = surgery.backward(losses)             # writes the update into every .grad
        optimizer.step()

The domain gradients are the rows of one matrix G [D, P], allocated once: during the backward pass of domain d every
.grad is a view of row d. A parameter that no domain's loss reaches has .grad None afterwards, as after a plain backward
pass. Method: ECAI 2024, see `rules/corgrad.py`. Apply weight decay and gradient clipping after `backward`. With
BatchNorm in train mode every domain is normalised by its own statistics; with frozen BatchNorm, GroupNorm or LayerNorm
the sum of the domain gradients is exactly the gradient of one joint step.

float16 autocast: pass the GradScaler to `backward` instead of calling `scaler.scale`:

        surgery.backward(losses, scaler=scaler)        # torch.amp.GradScaler
        scaler.step(optimizer)                         # skips the step if a domain gradient held inf or NaN
        scaler.update()                                # and lowers the scale

The rule sees unscaled gradients, and .grad is scaled again, so that `scaler.unscale_` may be called before clipping. A
step that the scaler skips does not advance `alpha_schedule` and does not change the state of a rule.

DistributedDataParallel: works with its default options, if every loss has its own forward pass. It averages each domain
gradient over the processes, so that all processes compute the same update. Rules that draw random numbers use torch's
default generators: seed these equally in all processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor
from torch.amp import GradScaler

from gsdg.surgery.buffers import GradientBuffers
from gsdg.surgery.elementwise import ElementGramCombiner, ElementRuleCombiner
from gsdg.surgery.nonfinite import (
    FirstNonFinite,
    NonFiniteGradient,
    describe_nonfinite,
    describe_overflow,
    domain_name,
)
from gsdg.surgery.norm_outliers import AlphaSchedule, NormOutliers
from gsdg.surgery.parameters import Given, Parameters
from gsdg.surgery.partition import Chunk, Layers, Partition, PerElement
from gsdg.surgery.partwise import PartCombiner
from gsdg.surgery.rules.base import ElementRule, GramRule, Metrics, Reduction, Rule
from gsdg.surgery.rules.corgrad import CorGrad, Order, ProjectOn
from gsdg.surgery.rules.precision import GRAM_EPS
from gsdg.utils.errors import UserError, check_literal, listing

Storage = Literal["full", "bf16"]
Loss = Tensor | Iterable[Tensor]
Combiner = PartCombiner | ElementRuleCombiner | ElementGramCombiner


class Surgery:
    """Gradient surgery on `params`: a partition, a rule and the norm-outlier correction.

    Args:
        params: the model's parameters, or `model.named_parameters()`, all float32 or all float64, on one device. Those
            without requires_grad are left out. First move the model to its device and memory format and freeze what is
            to be frozen: changes after this call are refused.
        partition: splits the parameters into parts.
        rule: combines the D domain gradients of each part.
        outliers: the norm-outlier correction; None: off.
        storage: "full", or "bf16": G takes half the memory (benchmarks/storage.py measures what this does to the
            update); for float32 parameters only.
        names: one per parameter, if `params` has none. Used in messages, and by the partitions `module` and `groups`.
    Attributes:
        step: number of updates so far, an int. Once a GradScaler was given on an accelerator: a 0-dim tensor on it,
            because the host does not know which steps are skipped.
        metrics: of the last update: name -> 0-dim tensor.
        combiner: computes the update from the domain gradients; holds the rule and the outlier correction.
    Raises:
        UserError: for parameters, or a combination of partition, rule and correction, that cannot work.
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
        trained, self.names = self._parameters.trained, self._parameters.names
        self.shapes = [p.shape for p in trained]
        dtype, device = trained[0].dtype, trained[0].device
        _check_use(self.shapes, dtype, partition, storage)
        self.partition = partition
        outliers = NormOutliers(1.0) if outliers is None else outliers
        self.combiner = _combiner(self.shapes, self.names, device, partition, rule, outliers)
        self.step = 0
        self.metrics: Metrics = {}
        self._buffers = GradientBuffers(trained, self.names, torch.bfloat16 if storage == "bf16" else dtype)
        self._update = self._buffers.update
        self._n_domains, self._domains = 0, None
        self._losses = torch.zeros(0, dtype=dtype, device=device)
        self._first_nonfinite = FirstNonFinite(device)
        self._sync_is_free = device.type == "cpu"  # on other devices reading a value stalls the host
        self._scale: Tensor | None = None  # of the GradScaler, 0-dim, during a `backward` that was given one
        self._finite: Tensor | None = None  # 0-dim bool: whether all gradients of that step are finite

    @property
    def rule(self) -> Rule:
        return self.combiner.rule

    def backward(
        self,
        losses: Iterable[Loss],
        domains: Sequence[str] | None = None,
        *,
        shared_graph: bool = False,
        scaler: GradScaler | None = None,
    ) -> dict[str, Tensor]:
        """Run the backward pass of each loss, combine the domain gradients, and write the update into every .grad.

        The previous content of .grad is discarded. After an error every .grad is None, so that an optimizer step
        changes nothing.

        Args:
            losses: D scalars, not scaled. Each has its own graph, or all share one with `shared_graph`. A generator is
                asked for the next loss after the graph of the previous loss was freed. A loss may also be an iterable
                of terms, each with its own graph, whose gradients are added up: for a large batch in pieces.
            domains: the names of the D domains, for messages.
            scaler: scales the losses and .grad. Where a gradient is not finite, .grad is NaN, at which `scaler.step`
                skips the step.
        Returns: "loss", the mean of the unscaled losses, and the metrics of the rule: 0-dim tensors on the device, so
            that nothing waits for the device.
        Raises:
            UserError: for losses that are no scalars with a graph, do not match `domains` or reach no parameter.
            NonFiniteGradient: on a CPU, without a scaler, if a domain gradient holds NaN or inf.
        """
        try:
            self._scale = self._scale_of(scaler)
            self._fill_rows(losses, domains, shared_graph, scaler)
            self.combine(self.gradients, domains)
            if self._scale is not None:
                assert self._finite is not None, "`combine` has checked the gradients"
                self._scale_update(self._scale, self._finite)
        except BaseException:
            self._buffers.clear()
            raise
        finally:
            self._scale = None
        self._buffers.point_to_update()
        return {"loss": self.losses.mean(), **self.metrics}

    def collect(
        self, losses: Iterable[Loss], domains: Sequence[str] | None = None, *, shared_graph: bool = False
    ) -> Tensor:
        """Run the backward pass of each loss and return the domain gradients G [D, P]; the rule is not applied.

        Args: as for `backward`.
        Returns: a view of the buffer that the next `collect` or `backward` overwrites. Row d holds the gradients of
            loss d, flattened and concatenated in parameter order; zeros for parameters that the loss does not reach.
            Every .grad is None afterwards, also after an error. `set_grads` writes an update [P] into .grad.
        """
        try:
            self._fill_rows(losses, domains, shared_graph, None)
        except BaseException:
            self._buffers.clear()
            raise
        return self.gradients

    @torch.no_grad()
    def combine(self, G: Tensor, domains: Sequence[str] | None = None) -> Tensor:
        """Combine the domain gradients G [D, P] into one update [P], and count a step.

        Args:
            G: one row per domain, its gradients flattened and concatenated in parameter order.
            domains: the names of the D domains, for messages.
        Returns: the update, in a buffer that every call reuses.
        Raises:
            NonFiniteGradient: on a CPU, if G holds NaN or inf; nothing is written then. On an accelerator this check
                would stall the host: there the update is all zeros, and `first_nonfinite` names the gradient later.
        """
        self._check_shape(G)
        G = G if G.stride(1) == 1 else G.contiguous()
        self._domains = domains
        self.rule.start_step(len(G))
        check_finite = partial(self._check_finite, G)
        self.metrics = self.combiner.combine(G, self._update, self.step, GRAM_EPS[G.dtype], check_finite)
        self.step += 1
        return self._update

    @torch.no_grad()
    def set_grads(self, update: Tensor) -> None:
        """Write `update` [P] into every .grad; .grad is None where no loss of the last `collect` reached."""
        self._update.copy_(update)
        self._buffers.point_to_update()

    @property
    def gradients(self) -> Tensor:
        """[D, P]: the domain gradients of the last `collect` or `backward`."""
        return self._buffers.rows(self._n_domains)

    @property
    def losses(self) -> Tensor:
        """[D]: the losses of the last `collect` or `backward`, detached and unscaled."""
        return self._losses

    @property
    def domains(self) -> list[str]:
        """The D names given to the last `collect`, `backward` or `combine`; "domain 0" and so on if none were given."""
        if self._domains is None:
            return [domain_name(d, None) for d in range(self._n_domains)]
        return list(self._domains)

    def find_nonfinite(self, G: Tensor | None = None, domains: Sequence[str] | None = None) -> str | None:
        """Name the domain and tensor whose gradient holds NaN or inf; None if all are finite.

        Reads every value of G [D, P] (None: of `gradients`), and so waits for the device.
        """
        if G is None:
            G, domains = self.gradients, domains or self._domains
        return describe_nonfinite(G, self.shapes, self.names, domains)

    def first_nonfinite(self) -> str | None:
        """Name the first gradient that was replaced by zeros, with its step; None if none was. Waits for the device."""
        return self._first_nonfinite.describe(self.shapes, self.names, self._domains)

    def state_dict(self) -> dict:
        return {"step": int(self.step), "rule": self.rule.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.step = int(state["step"])
        self.rule.load_state_dict(state["rule"])

    def _fill_rows(
        self,
        losses: Iterable[Loss],
        domains: Sequence[str] | None,
        shared_graph: bool,
        scaler: GradScaler | None,
    ) -> None:
        """Fill one row of G per loss, unscaled, and keep the losses [D], unscaled."""
        self._parameters.check_unchanged()
        expected = len(domains) if domains is not None else len(losses) if isinstance(losses, Sized) else 0
        values = []
        for loss in losses:  # no enumerate: it would keep the previous loss alive during the next forward pass
            d = len(values)
            with self._buffers.collecting(d, max(expected, d + 1), domain_name(d, domains)):
                values.append(self._add_gradients(loss, d, domains, shared_graph, scaler))
            del loss
        if not values or (domains is not None and len(values) != len(domains)):
            wanted = "at least 1" if domains is None else f"{len(domains)}, one for each of {listing(domains)}"
            raise UserError(f"found {len(values)} losses; expected {wanted}")
        self._buffers.check_reached()
        self._n_domains, self._domains = len(values), domains
        if self._scale is not None:
            self.gradients.mul_(self._scale.reciprocal())
        self._losses = torch.stack(values)

    def _add_gradients(
        self,
        loss: Loss,
        d: int,
        domains: Sequence[str] | None,
        shared_graph: bool,
        scaler: GradScaler | None,
    ) -> Tensor:
        """Run the backward pass of loss d, or of each of its terms. Returns its value, 0-dim, detached and unscaled."""
        value, is_one = None, isinstance(loss, Tensor) or not isinstance(loss, Iterable)
        for term in cast("Iterable[Tensor]", [loss] if is_one else loss):
            _check_loss(term, d, domains)
            detached = term.detach().reshape(())
            value = detached if value is None else value + detached
            scaled = term if scaler is None or self._scale is None else scaler.scale(term)
            _run_backward(scaled, d, domains, shared_graph)
            del term, scaled  # the graph, before the forward pass of the next term
        if value is None:
            raise UserError(
                f"the loss of {domain_name(d, domains)} is an empty sequence of terms; it needs one or more"
            )
        return value

    def _check_finite(self, G: Tensor, squares: Tensor, tensors: Tensor) -> Tensor | None:
        """Check the squared norms [S, D] of pieces of the gradients, which belong to the tensors [S].

        With a GradScaler: return whether all are finite, 0-dim; the scaler then skips the step. On an accelerator:
        return the same, and note on the device which gradient was not. On a CPU: raise NonFiniteGradient, or return
        None.
        """
        if self._scale is not None:
            self._finite = squares.isfinite().all()
            return self._finite
        if not self._sync_is_free:
            return self._first_nonfinite.note(squares, tensors, self.step)
        if not squares.isfinite().all():
            raise NonFiniteGradient(
                describe_nonfinite(G, self.shapes, self.names, self._domains)
                or describe_overflow(squares, tensors, self.shapes, self.names, self._domains, squares.dtype)
            )
        return None

    def _scale_of(self, scaler: GradScaler | None) -> Tensor | None:
        """The factor by which the scaler multiplies losses, 0-dim on the device; None without an enabled scaler."""
        if scaler is None or not scaler.is_enabled():
            return None
        return scaler.scale(torch.ones((), device=self._update.device))

    def _scale_update(self, scale: Tensor, finite: Tensor) -> None:
        """Scale the update, as the scaler expects it; after a non-finite gradient: all NaN, and no step is counted."""
        self._update.mul_(torch.where(finite, scale, torch.nan))
        skipped = ~finite
        self.step = self.step - (int(skipped) if self._sync_is_free else skipped.long())

    def _check_shape(self, G: Tensor) -> None:
        like = self._update
        right_type = G.dtype in (like.dtype, torch.bfloat16)
        if G.ndim != 2 or G.shape[1] != len(like) or len(G) < 1 or not right_type or G.device != like.device:
            raise UserError(
                f"G is {list(G.shape)} {G.dtype} on {G.device}; it must be [D, {len(like)}] {like.dtype} on "
                f"{like.device} (or bfloat16): one row per domain, its gradients flattened and concatenated in "
                "parameter order"
            )


class GradSurgery(Surgery):
    """The method of the paper: `Chunk(n_parts)`, `CorGrad` and `NormOutliers(alpha)`.

    Args:
        params, storage, names: see `Surgery`.
        n_parts, layers: see `Chunk`.
        order, project_on, reduction: see `CorGrad`.
        alpha, alpha_schedule, total_steps: see `NormOutliers`; alpha_schedule is its `schedule`.
    """

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


def _combiner(
    shapes: Sequence[torch.Size],
    names: Sequence[str] | None,
    device: torch.device,
    partition: Partition,
    rule: Rule,
    outliers: NormOutliers,
) -> Combiner:
    """What computes the update of parameters of these shapes and names. UserError where rule and partition clash."""
    if isinstance(partition, PerElement):
        kind = ElementRuleCombiner if isinstance(rule, ElementRule) else ElementGramCombiner
        sizes = [shape.numel() for shape in shapes]
        return kind(sizes, [partition.operates_on(shape) for shape in shapes], rule, outliers, device)
    if isinstance(rule, ElementRule):
        raise UserError(
            f"{type(rule).__name__} is an element-wise rule, and the partition is {type(partition).__name__}; "
            "valid: element (in a config, algorithm/partition=element)"
        )
    gram_rule = cast(GramRule, rule)  # the other kind, which need not be a subclass of GramRule
    return PartCombiner(partition.layout(shapes, device, names), gram_rule, outliers)


def _check_use(shapes: Sequence[torch.Size], dtype: torch.dtype, partition: Partition, storage: Storage) -> None:
    """UserError if the partition or the storage cannot be used for parameters of these shapes and this dtype."""
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
        given = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(
            f"the loss of {domain_name(d, domains)} is no scalar that requires grad (found {given}); "
            "give the reduced loss of that domain, not detached"
        )


def _run_backward(loss: Tensor, d: int, domains: Sequence[str] | None, shared_graph: bool) -> None:
    try:
        loss.backward(retain_graph=shared_graph)
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):  # torch has no exception class for this error
            raise
        raise UserError(
            f"the loss of {domain_name(d, domains)} shares its graph with an earlier loss, which was freed by its "
            "backward pass. Give a generator that makes one forward pass per domain, or "
            "backward(losses, shared_graph=True)"
        ) from error
