"""What DANN and CDANN share: alternating updates, the discriminator's network, gradient reversal, gradient penalty."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.algorithms.common.step_counter import StepCounter


class Turns(StepCounter):
    """Which of the two networks, model and discriminator, the next training step updates.

    Args:
        d_steps: number of discriminator steps per model step; with 0 every step updates both.
    """

    def __init__(self, d_steps: int) -> None:
        super().__init__()
        self.d_steps = d_steps

    @property
    def discriminator(self) -> bool:
        """Whether the next step updates the discriminator. As in DomainBed, the model comes first if d_steps = 1."""
        return self.d_steps == 0 or (self.done + 1) % (self.d_steps + 1) < self.d_steps

    @property
    def model(self) -> bool:
        """Whether the next step updates the model."""
        return self.d_steps == 0 or not self.discriminator


def perceptron(inputs: int, outputs: int, *, width: int, depth: int, dropout: float) -> nn.Sequential:
    """A multi-layer perceptron [N, inputs] -> [N, outputs] of `depth` linear layers.

    Each hidden layer has `width` units, followed by dropout and ReLU.
    """
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [nn.Linear(inputs, width), nn.Dropout(dropout), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class _GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return features.view_as(features)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradients[0], None


def reverse_gradient(features: Tensor, weight: float) -> Tensor:
    """Return the features unchanged; in the backward pass their gradient is multiplied by -weight."""
    return _GradientReversal.apply(features, weight)


def gradient_penalty(logits: Tensor, domains: Tensor, inputs: Tensor) -> Tensor:
    """Mean over images of |d CE_i / d inputs_i|^2, a differentiable 0-dim tensor.

    Args:
        logits: the discriminator's output for `inputs`, [N, D].
        domains: domain indices, [N].
        inputs: the discriminator's input, [N, F].
    """
    # The gradient of the sum is the gradient of each image's own loss, because no loss depends on another image's
    # input.
    total = F.cross_entropy(logits, domains, reduction="sum")
    (gradient,) = torch.autograd.grad(total, inputs, create_graph=True)
    return gradient.square().sum(1).mean()
