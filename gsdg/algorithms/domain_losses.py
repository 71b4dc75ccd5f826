"""Algorithms whose loss is the mean of one loss a source domain: those losses may go through gradient surgery.

    L(theta) = 1 / D  sum_d L_d(theta)          without surgery
    update   = rule of (grad L_1, ..., grad L_D)  with `algorithm/surgery=...`

The domains go through the network as one batch, as in DomainBed, so that with surgery the graph is kept for D
backward passes: `algorithm=grad_surgery` is the cheaper form for plain cross-entropy.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gsdg.algorithms.base import Algorithm
from gsdg.batch import Batch
from gsdg.surgery import Surgery

MakeSurgery = Callable[..., Surgery] | None  # of a list of parameters and names=; None: no surgery


class DomainLosses(Algorithm):
    """surgery: makes a `gsdg.surgery.Surgery` of parameters and their names; None: the plain mean."""

    def __init__(self, *, surgery: MakeSurgery = None) -> None:
        super().__init__()
        self.make_surgery = surgery
        self.surgery: Surgery | None = None

    def setup(self, model: nn.Module, domains: Sequence[str]) -> None:
        """A subclass adds its own modules before it calls this: surgery operates on all that are trained."""
        super().setup(model, domains)
        if self.make_surgery:
            named = {name: p for name, p in self.named_parameters() if p.requires_grad}
            self.surgery = self.make_surgery(list(named.values()), names=list(named))

    @abstractmethod
    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One 0-dim loss a domain, in order, and 0-dim tensors to record beside their mean."""

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        losses, metrics = self.losses(batches)
        metrics = {name: value.detach() for name, value in metrics.items()}
        if self.surgery:
            return self.surgery.backward(losses, self.domains, shared_graph=True) | metrics
        loss = torch.stack(losses).mean()
        loss.backward()
        return {"loss": loss.detach(), **metrics}

    def blame(self) -> str:
        return (self.surgery.first_nonfinite() or "") if self.surgery else ""

    def get_extra_state(self) -> dict:
        return self.surgery.state_dict() if self.surgery else {}

    def set_extra_state(self, state: dict) -> None:
        if self.surgery:
            self.surgery.load_state_dict(state)
