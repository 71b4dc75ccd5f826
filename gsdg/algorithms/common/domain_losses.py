"""The base class of algorithms whose loss is the mean of one loss per source domain.

    L(theta) = 1 / D  sum_d L_d(theta)            without surgery
    update   = rule of (grad L_1, ..., grad L_D)  with `algorithm/surgery=...`

The domains go through the network in one joint batch, as in DomainBed. With surgery this graph is therefore kept for D
backward passes; for plain cross-entropy `algorithm=grad_surgery` is cheaper.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.grad_surgery import GradSurgery, HoldsSurgery
from gsdg.models.classifier import Classifier
from gsdg.surgery import Diagnostics, Surgery
from gsdg.types import Batch
from gsdg.utils.errors import UserError


class DomainLosses(Algorithm):
    """An algorithm with one loss per source domain. Subclasses implement `losses`.

    Args:
        surgery: gradient surgery to apply to the domain gradients; None: the mean of the losses is minimised. Of the
            GradSurgery, which is what a config describes, only the surgery factory is used.
    """

    def __init__(self, *, surgery: GradSurgery | None = None) -> None:
        super().__init__()
        if surgery is not None and getattr(surgery, "engine", None) != "joint":
            raise UserError(
                "algorithm.surgery: expected gradient surgery with engine: joint, as in conf/algorithm/surgery.\n"
                "Choose one of those: algorithm/surgery=pcgrad."
            )
        self.surgery_factory = surgery.surgery_factory if surgery else None
        self.surgery: SurgeryModule | None = None
        self.reuses_graph = self.reuses_graph or surgery is not None
        if surgery is not None and surgery.needs_all_domains:
            self.needs_all_domains = surgery.needs_all_domains

    def setup(self, model: Classifier, domains: Sequence[str]) -> None:
        """Store the model and build the surgery on all trainable parameters.

        Subclasses must therefore add their own modules before they call this.
        """
        super().setup(model, domains)
        if self.surgery_factory:
            self.surgery = SurgeryModule(self.surgery_factory(self), self.surgery_factory.diagnostics)

    @abstractmethod
    def losses(self, batches: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The loss of each domain, 0-dim, in domain order; and further metrics to record, 0-dim."""

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        losses, metrics = self.losses(batches)
        metrics = {name: value.detach() for name, value in metrics.items()}
        if self.surgery:
            return self.surgery.backward(losses, [batch.domain for batch in batches], self.scaler) | metrics
        loss = torch.stack(losses).mean()
        self.scaled(loss).backward()
        return {"loss": loss.detach(), **metrics}

    def diagnostics(self) -> dict:
        return self.surgery.diagnostics() if self.surgery else {}

    def nonfinite_report(self) -> str:
        return self.surgery.nonfinite_report() if self.surgery else ""


class SurgeryModule(HoldsSurgery, nn.Module):
    """A `Surgery` as a submodule of an algorithm, so that its state is in the algorithm's `state_dict`."""

    def __init__(self, surgery: Surgery, diagnostics: Diagnostics | None) -> None:
        super().__init__()
        self.surgery, self.statistics = surgery, diagnostics

    def backward(
        self, losses: Sequence[Tensor], domains: Sequence[str], scaler: GradScaler | None
    ) -> dict[str, Tensor]:
        return self.surgery.backward(losses, domains, shared_graph=True, scaler=scaler)

    def __deepcopy__(self, memo: dict) -> SurgeryModule:
        """A copy that shares the `Surgery`: it holds D gradients per weight, and a copied algorithm only predicts."""
        return SurgeryModule(self.surgery, self.statistics)
