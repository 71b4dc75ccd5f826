"""Fish, gradient matching for domain generalization (Shi et al., ICLR 2022, arXiv:2104.09937).

    theta_0 = theta;   theta_d = step(theta_(d-1), grad L_d(theta_(d-1)))   d = 1 ... D
    theta  <- theta + meta_lr (theta_D - theta)

The steps are the run's optimizer's, whose state (Adam's moments) goes on from one update to the next. In expectation
over the order of the domains the update rewards gradients with large inner products.

Deviations from DomainBed: no network is copied, the weights themselves make the steps and come back. BatchNorm's
statistics are interpolated like the weights, but `num_batches_tracked` counts on, where it is cut to an integer there.
`loss` is the mean of the D losses, not the last. A gradient that is not finite does not reach the weights.
The authors' code draws the domains of an update and their order (`shuffle` draws the order; in DomainBed it is fixed),
divides meta_lr by D, and on some data sets starts from weights trained by ERM, or forgets the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.elsewhere import with_gradient
from gsdg.batch import Batch
from gsdg.errors import check_range
from gsdg.surgery import NonFiniteGradient


class Fish(Algorithm):
    """meta_lr: how far to go to where the domains' steps lead. shuffle: the domains' order is drawn at every update."""

    needs_domains = 2
    no_surgery = "it makes a step after each domain's gradient, so that no two are of the same weights"

    def __init__(self, *, meta_lr: float, shuffle: bool = False) -> None:
        super().__init__()
        check_range("algorithm", "(0, inf)", meta_lr=meta_lr)
        self.meta_lr, self.shuffle = meta_lr, shuffle

    def setup(self, model: nn.Module, domains: Sequence[str]) -> None:
        super().setup(model, domains)
        device = next(model.parameters()).device
        self._reading_is_free = device.type == "cpu"  # elsewhere the host would wait for the device
        self._first_bad = torch.full((), -1, device=device)  # the domain with a gradient that was not finite

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """The first domain's gradient; the others' are taken in `step`, which also completes `loss`."""
        order = torch.randperm(len(batches)).tolist() if self.shuffle else range(len(batches))
        first, *self._others = [batches[d] for d in order]
        self._start = [tensor.detach().clone() for tensor in self._interpolated()]
        self._metrics = {"loss": self._descend(first)}
        return self._metrics

    def step(self, optimizer: Optimizer) -> None:
        optimizer.step()
        losses = [self._metrics["loss"]]
        for batch in self._others:
            optimizer.zero_grad(set_to_none=True)
            losses.append(self._descend(batch))
            self._keep_finite(batch.domain)
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self._interpolated(), self._start, 1 - self.meta_lr)
        self._metrics["loss"] = torch.stack(losses).mean()
        self._others, self._start = [], []

    def _descend(self, batch: Batch) -> Tensor:
        loss = F.cross_entropy(self.model(batch.images), batch.labels)
        loss.backward()
        return loss.detach()

    def _interpolated(self) -> list[Tensor]:
        """The trained parameters, and what BatchNorm averages; not its counters."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return trained + [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]

    def _keep_finite(self, domain: str) -> None:
        """The trainer has checked the first gradient only. A later one that is not finite stops the run at the start's
        weights; where reading it would make the host wait, zeros take its place, and `blame` tells."""
        weights, gradients = with_gradient(self.model)
        finite = torch.nn.utils.get_total_norm(gradients).isfinite()
        if not self._reading_is_free:
            for weight in weights:
                weight.grad = torch.where(finite, weight.grad, 0)
            known = finite | (self._first_bad >= 0)
            self._first_bad = torch.where(known, self._first_bad, self.domains.index(domain))
        elif not finite:
            with torch.no_grad():
                torch._foreach_copy_(self._interpolated(), self._start)
            raise NonFiniteGradient(nonfinite(domain) + "no update was made.")

    def blame(self) -> str:
        d = int(self._first_bad)
        return nonfinite(self.domains[d]) + "zeros went to the optimizer in its place." if d >= 0 else ""


def nonfinite(domain: str) -> str:
    return f"the gradient of domain {domain!r}, after the steps of those before it, holds NaN or inf: "
