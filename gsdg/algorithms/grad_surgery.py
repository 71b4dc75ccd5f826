"""Gradient surgery: one gradient per source domain, a partition that says what is compared, a rule that says what is
made of it. With the partition `chunk` and the rule `corgrad` it is GradSurgery (ECAI 2024, "Rethinking Domain
Generalization from Perspective of Gradient Granularity"); the baselines are presets of the same class.

The rules are `gsdg/surgery/rules/`, the engine is `gsdg/surgery/surgery.py`; this file joins them to a model.

Deviations: the defaults do what the released commands execute (all layers, constant alpha), not what their
`--use_alpha` flag is called; `layers: weights` sums the other tensors where the release keeps the last domain's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.algorithms.base import Algorithm
from gsdg.batch import Batch
from gsdg.surgery import Diagnostics, NormOutliers, Partition, Surgery
from gsdg.surgery.rules.base import Rule


class GradSurgery(Algorithm):
    """partition, rule: see `gsdg.surgery`. alpha: weight of a norm-outlier domain's own gradient (1: no correction).

    alpha_schedule: `log` needs total_steps. engine: `micro_batch`, a forward and backward a domain, or `joint`, one
    forward of all domains and a backward each: slower, but BatchNorm in train mode sees them together.
    storage: `bf16` halves the memory of the kept gradients. diagnostics: of every logged step, conflicts by module and
    granularity.
    """

    no_surgery = "it is one already: choose algorithm/partition and algorithm/rule"

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
        self.partition, self.rule, self.engine, self.storage = partition, rule, engine, storage
        self.outliers = NormOutliers(alpha, schedule=alpha_schedule, total_steps=total_steps)
        self.diagnostics = Diagnostics(getattr(partition, "n_parts", 10)) if diagnostics else None

    def setup(self, model: nn.Module, domains: Sequence[str]) -> None:
        super().setup(model, domains)
        self.operate_on(model)

    def operate_on(self, module: nn.Module) -> None:
        """Make the surgery on all that a module trains: the model, or an algorithm whose losses are operated on.

        The model's parameters have the same names in both cases, the model's own, which patterns and diagnostics use.
        """
        prefix = "model." if isinstance(module, Algorithm) else ""
        named = [(name.removeprefix(prefix), p) for name, p in module.named_parameters() if p.requires_grad]
        options = {"outliers": self.outliers, "storage": self.storage}
        self.surgery = Surgery(named, self.partition, self.rule, **options)

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        joint = self.engine == "joint"
        losses = self._joint_losses(batches) if joint else self._losses(batches)
        return self.surgery.backward(losses, [batch.domain for batch in batches], shared_graph=joint)

    def _losses(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        return (F.cross_entropy(self.model(batch.images), batch.labels) for batch in batches)

    def _joint_losses(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        logits = self.model(torch.cat([batch.images for batch in batches])).split([len(b.labels) for b in batches])
        return (F.cross_entropy(own, batch.labels) for own, batch in zip(logits, batches, strict=True))

    def diagnose(self) -> dict:
        return self.diagnostics(self.surgery) if self.diagnostics else {}

    def blame(self) -> str:
        return self.surgery.first_nonfinite() or ""

    def get_extra_state(self) -> dict:
        return self.surgery.state_dict()

    def set_extra_state(self, state: dict) -> None:
        self.surgery.load_state_dict(state)
