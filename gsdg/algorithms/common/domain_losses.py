"""Algorithms whose loss is the mean of one loss a source domain: those losses may go through gradient surgery.

    L(theta) = 1 / D  sum_d L_d(theta)            without surgery
    update   = rule of (grad L_1, ..., grad L_D)  with `algorithm/surgery=...`

The domains go through the network as one batch, as in DomainBed, so that with surgery the graph is kept for D
backward passes: for plain cross-entropy `algorithm=grad_surgery` is the cheaper form.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.batch import Batch
from gsdg.errors import UserError


class DomainLosses(Algorithm):
    """surgery: what is made of the domains' gradients; None: their mean."""

    def __init__(self, *, surgery: GradSurgery | None = None) -> None:
        super().__init__()
        if surgery is not None and getattr(surgery, "engine", None) != "joint":
            raise UserError(
                "algorithm.surgery: expected gradient surgery with engine: joint, as conf/algorithm/surgery has it.\n"
                "Choose one of those: algorithm/surgery=pcgrad."
            )
        self.surgery = surgery

    def setup(self, model: nn.Module, domains: Sequence[str]) -> None:
        """A subclass adds its own modules before it calls this: surgery operates on all that are trained."""
        super().setup(model, domains)
        if self.surgery:
            self.surgery.operate_on(self)

    @abstractmethod
    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One 0-dim loss a domain, in order, and 0-dim tensors to record beside their mean."""

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        losses, metrics = self.losses(batches)
        metrics = {name: value.detach() for name, value in metrics.items()}
        if self.surgery:
            return self.surgery.surgery.backward(losses, self.domains, shared_graph=True) | metrics
        loss = torch.stack(losses).mean()
        loss.backward()
        return {"loss": loss.detach(), **metrics}

    def diagnose(self) -> dict:
        return self.surgery.diagnose() if self.surgery else {}

    def blame(self) -> str:
        return self.surgery.blame() if self.surgery else ""
