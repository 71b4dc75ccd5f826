"""Gradient surgery as an algorithm: one gradient per source domain, a partition that splits the parameters into parts,
and a rule that combines the D domain gradients of each part. With the partition `chunk` and the rule `corgrad` it is
GradSurgery (ECAI 2024, "Rethinking Domain Generalization from Perspective of Gradient Granularity"); the baselines are
configs of the same class.

The rules are in `gsdg/surgery/rules/`, the computation is in `gsdg/surgery/surgery.py`; this file applies it to a
model.

Deviations from the released code: the defaults do what the released commands execute (all layers, constant alpha), not
what their flag `--use_alpha` suggests. `layers: weights` sums the domain gradients of the other tensors, where the
release keeps those of the last domain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.common.micro_batches import cross_entropy_terms
from gsdg.models.classifier import Classifier
from gsdg.surgery import Diagnostics, NormOutliers, Partition, Surgery
from gsdg.surgery.rules.base import Rule
from gsdg.surgery.surgery import Loss
from gsdg.types import Batch


@dataclass(kw_only=True)
class SurgeryFactory:
    """The settings of a gradient surgery; calling it with a module builds the `Surgery` of that module's parameters."""

    partition: Partition
    rule: Rule
    outliers: NormOutliers
    storage: Literal["full", "bf16"]
    diagnostics: Diagnostics | None  # None: off

    def __call__(self, module: nn.Module) -> Surgery:
        """Build the surgery on all trainable parameters of a model or of an algorithm.

        The parameters of an algorithm's model are named as in the model, without the prefix `model.`, so that name
        patterns and diagnostics are the same in both cases.
        """
        prefix = "model." if isinstance(module, Algorithm) else ""
        named = [(name.removeprefix(prefix), p) for name, p in module.named_parameters() if p.requires_grad]
        return Surgery(named, self.partition, self.rule, outliers=self.outliers, storage=self.storage)


class HoldsSurgery:
    """What a module with a `surgery` reports of it and saves in its `state_dict`. statistics: None if they are off."""

    surgery: Surgery
    statistics: Diagnostics | None

    def diagnostics(self) -> dict:
        return self.statistics(self.surgery) if self.statistics else {}

    def nonfinite_report(self) -> str:
        return self.surgery.first_nonfinite() or ""

    def get_extra_state(self) -> dict:
        return self.surgery.state_dict()

    def set_extra_state(self, state: dict) -> None:
        self.surgery.load_state_dict(state)


class GradSurgery(HoldsSurgery, Algorithm):
    """Gradient surgery on the cross-entropy losses of the source domains.

    Args:
        partition: splits the parameters into parts, see `gsdg.surgery.partition`.
        rule: combines the D domain gradients of each part, see `gsdg.surgery.rules`.
        alpha: weight of the own gradient of a domain whose gradient norm is an outlier, in [0, 1]; 1: no correction.
        alpha_schedule: `constant`, or `log`: 1 - ln(t + 1) / ln(total_steps) instead of alpha, with t = 0 at the first
            step.
        total_steps: length of the training in steps; required by the schedule `log`.
        engine: `micro_batch`, one forward and backward pass per domain; or `joint`, one forward pass of all domains and
            one backward pass per domain: slower, but BatchNorm in train mode sees all domains together.
        storage: `full`, or `bf16`, which stores the domain gradients in half the memory.
        diagnostics: whether conflict statistics per module and granularity are computed at every logged step.
    """

    takes_loss_scaling = True
    no_surgery = "it is gradient surgery itself: choose algorithm/partition and algorithm/rule"

    def __init__(
        self,
        *,
        partition: Partition,
        rule: Rule,
        alpha: float = 1.0,
        alpha_schedule: Literal["constant", "log"] = "constant",
        total_steps: int | None = None,
        engine: Literal["micro_batch", "joint"] = "micro_batch",
        storage: Literal["full", "bf16"] = "full",
        diagnostics: bool = False,
    ) -> None:
        super().__init__()
        outliers = NormOutliers(alpha, schedule=alpha_schedule, total_steps=total_steps)
        self.statistics = Diagnostics(getattr(partition, "n_parts", 10)) if diagnostics else None
        self.surgery_factory = SurgeryFactory(
            partition=partition, rule=rule, outliers=outliers, storage=storage, diagnostics=self.statistics
        )
        if rule.per_part_state:
            self.needs_all_domains = f"has the rule {type(rule).__name__}, whose state belongs to domains"
        self.engine, self.takes_micro_batches, self.reuses_graph = engine, engine == "micro_batch", engine == "joint"

    def setup(self, model: Classifier, domains: Sequence[str]) -> None:
        super().setup(model, domains)
        self.surgery = self.surgery_factory(model)

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        joint = self.engine == "joint"
        losses = self._joint_losses(batches) if joint else self._losses(batches)
        domains = [batch.domain for batch in batches]
        return self.surgery.backward(losses, domains, shared_graph=joint, scaler=self.scaler)

    def _losses(self, batches: Sequence[Batch]) -> Iterator[Loss]:
        if size := self.micro_batch_size:
            return (cross_entropy_terms(self.model, batch.images, batch.labels, size) for batch in batches)
        return (F.cross_entropy(self.model(batch.images), batch.labels) for batch in batches)

    def _joint_losses(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        logits = self.model(torch.cat([batch.images for batch in batches])).split([len(b.labels) for b in batches])
        pairs = zip(logits, batches, strict=True)
        return (F.cross_entropy(domain_logits, batch.labels) for domain_logits, batch in pairs)
