"""Loss scaling for trainer.precision=fp16: small gradients would be rounded to zero in float16 (Micikevicius et al.,
"Mixed Precision Training", ICLR 2018, arXiv:1710.03740).

    .grad = grad (s * loss),  then .grad / s in float32

An infinite gradient means that s is too large: the update is skipped, and torch's GradScaler halves s; after 2,000 good
steps it doubles s. Gradient surgery gets the scaler and operates on the gradients after the division; the norm and
trainer.clip_norm are of these too. A skipped step counts as a step: the batch is used up, the schedule advances.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from gsdg.algorithms import Algorithm
from gsdg.step_metrics import NonFinite
from gsdg.utils.errors import UserError

SMALLEST = 2.0**-24  # of the scale: float16's smallest number, so that even gradients near 1 would underflow


class LossScaling:
    """Scales the losses of an algorithm, and skips the updates whose gradients overflowed.

    Args:
        algorithm: it scales its losses by its `scaler`, which is set here.
        device: of the training.
    """

    def __init__(self, algorithm: Algorithm, device: torch.device) -> None:
        self.scaler = algorithm.scaler = GradScaler(device.type)
        self.name = type(algorithm).__name__

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide all gradients by the scale, and note whether one is not finite. UserError: no loss was scaled."""
        try:
            self.scaler.unscale_(optimizer)
        except AssertionError as error:  # the scaler knows its scale from the first loss on
            raise UserError(
                f"trainer.precision=fp16: {self.name}.backward has scaled no loss. Call self.scaled(loss).backward() "
                "there, or set takes_loss_scaling = False in the class."
            ) from error

    def step(self, optimizer: Optimizer, grad_norm: Tensor) -> dict[str, Tensor]:
        """Update, or skip the update; then adapt the scale.

        Args:
            grad_norm: 0-dim, of the unscaled gradients; not finite if one of them is not.

        Returns:
            The metrics `skipped`, 1 or 0, and `grad_norm`, 0 for a skipped step: 0-dim tensors.
        """
        self.scaler.step(optimizer)
        self.scaler.update()
        finite = grad_norm.isfinite()
        return {"skipped": (~finite).float(), "grad_norm": grad_norm.where(finite, 0.0)}

    def check(self, step: int) -> None:
        """NonFinite if the scale has become useless, because one step after the other was skipped."""
        if (scale := self.scaler.get_scale()) < SMALLEST:
            raise NonFinite(
                f"trainer.precision=fp16: gradients overflow at every step, and at step {step + 1} the loss scale is "
                f"{scale:.1e}. Use trainer.precision=bf16 or float32, or a lower learning rate."
            )
