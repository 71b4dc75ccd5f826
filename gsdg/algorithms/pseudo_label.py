"""Pseudo-Label (Lee, ICML 2013 workshop): confident predictions on the target's unlabelled images are taken for labels.

    L = 1/N sum_i CE(f(x_i), y_i) + w(t) / M sum_j [max_c p_j,c >= tau] CE(f(u_j), argmax_c p_j,c)

x_i are the N images of the source domains, u_j the M unlabelled images of the targets (split.uda_fraction > 0), and
p_j = softmax f(u_j) is held constant. w(t) grows linearly from 0 to w during the first `ramp_steps` steps.

Deviations: Lee's w(t) is 0 for 100 epochs and then grows, and there is no threshold tau. This form, with DomainBed's
batches, is that of Sagawa et al., "Extending the WILDS benchmark for unsupervised adaptation", ICLR 2022,
arXiv:2112.05090, where w(t) grows during 40 % of the training and all images go through the network in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.common.step_counter import StepCounter
from gsdg.types import UNLABELLED, Batch, join
from gsdg.utils.errors import check_range


class PseudoLabel(Algorithm):
    """ERM plus the cross-entropy of the target's unlabelled images with their own confident predictions.

    Args:
        weight: w, weight of the second term after `ramp_steps` steps, >= 0.
        threshold: tau, the probability from which on a prediction is taken for a label, in [0, 1].
        ramp_steps: training steps during which the weight grows from 0, >= 0.
    """

    takes_unlabelled = True
    needs_unlabelled = True
    needs = "unlabelled images of the target: split.uda_fraction=0.5"
    no_surgery = "its images of the target have no domain gradient of their own"

    def __init__(self, *, weight: float, threshold: float, ramp_steps: int) -> None:
        super().__init__()
        check_range("algorithm", "[0, inf)", weight=weight, ramp_steps=ramp_steps)
        check_range("algorithm", "[0, 1]", threshold=threshold)
        self.weight, self.threshold, self.ramp_steps = weight, threshold, ramp_steps
        self.counter = StepCounter()

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        joint = join(batches)
        logits = self.model(joint.images)
        nll = F.cross_entropy(logits, joint.labels, ignore_index=UNLABELLED)
        consistency, used = self.consistency(logits, joint.labels == UNLABELLED)
        loss = nll + self.weight_now * consistency
        loss.backward()
        return {"loss": loss.detach(), "nll": nll.detach(), "consistency": consistency.detach(), "used": used}

    @property
    def weight_now(self) -> float:
        """w(t) of the next training step."""
        return self.weight * min(1.0, self.counter.done / self.ramp_steps) if self.ramp_steps else self.weight

    def consistency(self, logits: Tensor, of_target: Tensor) -> tuple[Tensor, Tensor]:
        """The second term without its weight, and the share of target images that it uses; 0-dim.

        Args:
            logits: [N + M, classes].
            of_target: [N + M] bool: the images of the targets.
        """
        confidence, predicted = logits.detach().float().softmax(1).max(1)
        used = of_target & (confidence >= self.threshold)
        labels = torch.where(used, predicted, UNLABELLED)
        total, n_target = F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum"), of_target.sum()
        return total / n_target.clamp(min=1), used.sum() / n_target.clamp(min=1)

    def step(self, optimizer: Optimizer) -> dict[str, Tensor]:
        self.counter.step(optimizer)
        return {}
