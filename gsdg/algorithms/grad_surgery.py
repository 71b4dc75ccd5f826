"""GradSurgery (ECAI 2024, "Rethinking Domain Generalization from Perspective of Gradient Granularity").

One gradient per source domain; within every chunk of every parameter tensor, conflicting gradients are projected
off each other; domains whose norm is an outlier are blended with the others; the sum is the update. The rule is
`gsdg/surgery/rules/corgrad.py`, the engine `gsdg/surgery/surgery.py`; this file joins them to a model.

Deviations: the defaults do what the released commands execute (all layers, constant alpha), not what their
`--use_alpha` flag is called; `layers: weights` sums the other tensors where the release keeps the last domain's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.algorithms.base import Algorithm
from gsdg.batch import Batch
from gsdg.surgery import Chunk, CorGrad, Surgery


class GradSurgery(Algorithm):
    """n_parts: chunks per tensor along dim 0. alpha: weight of a norm-outlier domain's own gradient (1: no blend).

    The switches are `CorGrad`'s. `total_steps` is needed by `alpha_schedule: log` only.
    """

    def __init__(
        self,
        *,
        n_parts: int = 10,
        alpha: float = 0.6,
        alpha_schedule: Literal["constant", "log"] = "constant",
        total_steps: int | None = None,
        order: Literal["fixed", "random"] = "fixed",
        project_on: Literal["modified", "original"] = "modified",
        reduction: Literal["sum", "mean"] = "sum",
        layers: Literal["all", "weights"] = "all",
    ) -> None:
        super().__init__()
        self.partition = Chunk(n_parts, layers=layers)
        self.rule = CorGrad(
            alpha=alpha,
            alpha_schedule=alpha_schedule,
            total_steps=total_steps,
            order=order,
            project_on=project_on,
            reduction=reduction,
        )

    def setup(self, model: nn.Module) -> None:
        super().setup(model)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.surgery = Surgery([p for _, p in named], self.partition, self.rule, names=[name for name, _ in named])

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        self.domains = [batch.domain for batch in batches]
        losses = (F.cross_entropy(self.model(batch.images), batch.labels) for batch in batches)
        return self.surgery.backward(losses, self.domains)

    def blame(self) -> str:
        return self.surgery.find_nonfinite(domains=self.domains) or ""

    def get_extra_state(self) -> dict:
        return self.surgery.state_dict()

    def set_extra_state(self, state: dict) -> None:
        self.surgery.load_state_dict(state)
