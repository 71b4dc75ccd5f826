"""Fish, gradient matching for domain generalization (Shi et al., ICLR 2022, arXiv:2104.09937).

    theta_0 = theta;   theta_d = step(theta_(d-1), grad L_d(theta_(d-1)))   d = 1 ... D
    theta  <- theta + meta_lr (theta_D - theta)

The inner steps are made by the run's optimizer, whose state (Adam's moments) is kept from one training step to the
next. In expectation over the order of the domains the update increases the inner products of the domain gradients.

Deviations from DomainBed: the network is not copied; the weights themselves make the inner steps and are interpolated
afterwards. BatchNorm's running statistics are interpolated like the weights, but `num_batches_tracked` keeps counting,
where DomainBed truncates its interpolation to an integer. `loss` is the mean of the D losses, not the last one.
Non-finite gradients never reach the weights.
Deviations from the authors' code: it draws the domains of an update and their order (`shuffle` draws the order; in
DomainBed it is fixed), divides meta_lr by D, and on some datasets starts from weights trained with ERM or resets the
optimizer state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.common.finite_steps import FiniteSteps
from gsdg.models.classifier import Classifier
from gsdg.types import Batch
from gsdg.utils.errors import check_range


class Fish(Algorithm):
    """One optimizer step per domain, then interpolation between the weights before and after these steps.

    Args:
        meta_lr: interpolation factor, > 0; 1 keeps the weights after the inner steps.
        shuffle: whether the order of the domains is drawn at every training step.
    """

    min_domains = 2
    several_updates = True
    no_surgery = "it makes an optimizer step after each domain's gradient, so no two gradients are of the same weights"

    def __init__(self, *, meta_lr: float, shuffle: bool = False) -> None:
        super().__init__()
        check_range("algorithm", "(0, inf)", meta_lr=meta_lr)
        self.meta_lr, self.shuffle = meta_lr, shuffle

    def setup(self, model: Classifier, domains: Sequence[str]) -> None:
        super().setup(model, domains)
        sources = [gradient_description(domain) for domain in domains]
        self.later_steps = FiniteSteps(sources, next(model.parameters()).device)

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Fill `.grad` with the first domain's gradient. `step` computes the other domains' and the mean loss."""
        order = torch.randperm(len(batches)).tolist() if self.shuffle else range(len(batches))
        first, *self._other_batches = [batches[d] for d in order]
        self._start = [tensor.detach().clone() for tensor in self._interpolated()]
        self._first_loss = self._domain_backward(first)
        return {"loss": self._first_loss}

    def step(self, optimizer: Optimizer) -> dict[str, Tensor]:
        # Inner steps, one per domain; `backward` has computed the first domain's gradient.
        optimizer.step()
        losses = [self._first_loss]
        for batch in self._other_batches:
            optimizer.zero_grad(set_to_none=True)
            losses.append(self._domain_backward(batch))
            self.later_steps.step(optimizer, self.model, gradient_description(batch.domain), undo=self._restore_start)
        # Meta step: theta + meta_lr (theta_D - theta), written as an interpolation that starts at theta_D.
        with torch.no_grad():
            torch._foreach_lerp_(self._interpolated(), self._start, 1 - self.meta_lr)
        self._other_batches, self._start = [], []
        return {"loss": torch.stack(losses).mean()}

    def _domain_backward(self, batch: Batch) -> Tensor:
        loss = F.cross_entropy(self.model(batch.images), batch.labels)
        loss.backward()
        return loss.detach()

    def _interpolated(self) -> list[Tensor]:
        """The trainable parameters and the floating-point buffers: BatchNorm's statistics, but not its counters."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return parameters + [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]

    @torch.no_grad()
    def _restore_start(self) -> None:
        torch._foreach_copy_(self._interpolated(), self._start)

    def nonfinite_report(self) -> str:
        return self.later_steps.nonfinite_report()


def gradient_description(domain: str) -> str:
    return f"the gradient of domain {domain!r}, after the optimizer steps of the domains before it,"
