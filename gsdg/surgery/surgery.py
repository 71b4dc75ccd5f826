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

import torch
from torch import Tensor

from gsdg.errors import UserError, listing
from gsdg.surgery.grams import combine, part_grams
from gsdg.surgery.nonfinite import NonFiniteGradient, describe_nonfinite, describe_overflow, domain_name
from gsdg.surgery.partition import Chunk, Layers
from gsdg.surgery.rules.corgrad import AlphaSchedule, CorGrad, Order, ProjectOn, Reduction

EPS = {torch.float32: 1e-6, torch.float64: 1e-12}  # what the rules treat as rounding error
ALIGN = 16  # elements; every row of G begins on a cache line, as vector loads want it (2 CPU cores do not notice)


class Surgery:
    """A partition and a rule on the gradients of `params`.

    params: parameters of one dtype (float32 or float64) on one device; those without requires_grad are left out. Move
    the model to its device and memory format first. names: one a parameter, for messages.
    """

    def __init__(
        self, params: Iterable[Tensor], partition: Chunk, rule: CorGrad, *, names: Sequence[str] | None = None
    ) -> None:
        self._params, self._names = _trainable(list(params), names)
        like = self._params[0]
        self.rule = rule
        self.table = partition.table([p.shape for p in self._params], like.device)
        self.step = 0
        self.metrics: dict[str, Tensor] = {}
        self._update = like.new_zeros(self.table.size)
        self._update_views = self._views(self._update)
        self._G = like.new_empty(0, self.table.size)
        self._row_views: list[list[Tensor]] = []
        self._n_domains, self._domains = 0, None

    @torch.no_grad()
    def combine(self, G: Tensor, domains: Sequence[str] | None = None) -> Tensor:
        """G [D, P], a domain's gradient a row, in parameter order -> the update [P], in a buffer every call reuses.

        Raises NonFiniteGradient, on a CPU, if G holds NaN or inf; nothing is written then. On an accelerator that
        check would stall the queue: NaN goes on into the update, and `find_nonfinite` says later where it came from.
        """
        self._check(G)
        G = G if G.stride(1) == 1 else G.contiguous()
        grams = part_grams(G, self.table)
        if G.device.type == "cpu":
            self._refuse_nonfinite(G, grams, domains)
        D, n_operated = len(G), self.table.n_operated
        weights, metrics = self.rule.weights(grams[:n_operated], self.table, step=self.step, eps=EPS[G.dtype])
        plain = weights.new_full((self.table.n_parts - n_operated, D), 1 / D if self.rule.reduction == "mean" else 1.0)
        weights = torch.cat((weights, plain))  # [K, D]
        self.metrics, self.step = metrics, self.step + 1
        return combine(G, weights, self.table, self._update)

    def backward(self, losses: Iterable[Tensor], domains: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Run each loss backward as it comes, operate on the gradients, and leave the update in every .grad.

        losses: D scalars, each of a graph of its own. A generator is asked for the next loss only when the last one's
        graph is gone. domains: their D names, for messages. What .grad held before is discarded.
        Returns the mean loss and the rule's metrics: 0-dim tensors on the device, so that nothing waits for it.
        After an error every .grad is None: an optimizer step would then change nothing.
        """
        try:
            mean_loss = self._accumulate(losses, domains)
            self.combine(self._G[: self._n_domains], domains)
        except BaseException:
            self._point_grads([None] * len(self._params))
            raise
        self._point_grads(self._update_views)
        return {"loss": mean_loss, **self.metrics}

    def find_nonfinite(self, G: Tensor | None = None, domains: Sequence[str] | None = None) -> str | None:
        """Which domain's gradient of which tensor holds NaN or inf, in words; None if all is finite.

        Looks at G [D, P], or at the gradients kept from the last `backward`. Waits for the device.
        """
        if G is None:
            G, domains = self._G[: self._n_domains], domains or self._domains
        return describe_nonfinite(G, [p.shape for p in self._params], self._names, domains)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = int(state["step"])

    def _accumulate(self, losses: Iterable[Tensor], domains: Sequence[str] | None) -> Tensor:
        """Fill one row of G a loss; returns the mean loss, 0-dim."""
        expected = len(domains) if domains is not None else len(losses) if isinstance(losses, Sized) else 0
        values = []
        for loss in losses:  # no enumerate: it would hold the last loss during the next forward
            d = len(values)
            _check_loss(loss, d, domains)
            self._point_grads(self._zeroed_row(d, max(expected, d + 1)))
            loss.backward()
            values.append(loss.detach().reshape(()))
            del loss
        if not values or (domains is not None and len(values) != len(domains)):
            wanted = "at least 1" if domains is None else f"{len(domains)}, one for each of {listing(domains)}"
            raise UserError(f"found {len(values)} losses; expected {wanted}")
        self._n_domains, self._domains = len(values), domains
        return torch.stack(values).mean()

    def _zeroed_row(self, d: int, n_rows: int) -> list[Tensor]:
        """The parameters' views of row d, zeroed. G grows to `n_rows` if it has no such row yet."""
        if d >= len(self._G):
            G = self._G.new_empty(n_rows, -(-self.table.size // ALIGN) * ALIGN)[:, : self.table.size]
            G[:d] = self._G[:d]
            self._G, self._row_views = G, [self._views(row) for row in G]
        self._G[d].zero_()
        return self._row_views[d]

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

    def _refuse_nonfinite(self, G: Tensor, grams: Tensor, domains: Sequence[str] | None) -> None:
        squares = grams.diagonal(dim1=1, dim2=2)  # [K, D]
        if not squares.isfinite().all():
            shapes = [p.shape for p in self._params]
            raise NonFiniteGradient(
                describe_nonfinite(G, shapes, self._names, domains)
                or describe_overflow(squares, self.table.part_tensor, shapes, self._names, domains, G.dtype)
            )

    def _check(self, G: Tensor) -> None:
        like = self._update
        if G.ndim != 2 or G.shape[1] != len(like) or len(G) < 1 or G.dtype != like.dtype or G.device != like.device:
            raise UserError(
                f"G is {list(G.shape)} {G.dtype} on {G.device}; it must be [D, {len(like)}] {like.dtype} on "
                f"{like.device}: one row a domain, its gradients flattened and concatenated in parameter order"
            )


class GradSurgery(Surgery):
    """The paper's method: `Chunk(n_parts)` x `CorGrad`. The options are described there, the verbs in `Surgery`."""

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
        names: Sequence[str] | None = None,
    ) -> None:
        rule = CorGrad(
            alpha=alpha,
            alpha_schedule=alpha_schedule,
            total_steps=total_steps,
            order=order,
            project_on=project_on,
            reduction=reduction,
        )
        super().__init__(params, Chunk(n_parts, layers=layers), rule, names=names)


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
    if len(kinds) > 1 or params[kept[0]].dtype not in EPS:
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
