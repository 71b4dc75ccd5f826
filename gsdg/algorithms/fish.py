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
from gsdg.algorithms.finite_steps import FiniteSteps
from gsdg.batch import Batch
from gsdg.errors import check_range


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
        self.later_steps = FiniteSteps([source_of(domain) for domain in domains], next(model.parameters()).device)

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
            self.later_steps.step(optimizer, self.model, source_of(batch.domain), undo=self._go_back)
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

    @torch.no_grad()
    def _go_back(self) -> None:
        torch._foreach_copy_(self._interpolated(), self._start)

    def blame(self) -> str:
        return self.later_steps.blame()


def source_of(domain: str) -> str:
    return f"the gradient of domain {domain!r}, after the steps of those before it,"
