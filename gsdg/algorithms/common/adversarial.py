"""What the game of DANN and CDANN is made of: turns, a discriminator, the reversal of its gradient, its slope."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.algorithms.steps import Steps


class Turns(Steps):
    """Whose step it is: `d_steps` of the discriminator alone for one of the model alone; with 0, each is of both."""

    def __init__(self, d_steps: int) -> None:
        super().__init__()
        self.d_steps = d_steps

    @property
    def discriminator(self) -> bool:
        """Does the step to come train it? DomainBed's order: where each has one step, the model begins."""
        return self.d_steps == 0 or (self.done + 1) % (self.d_steps + 1) < self.d_steps

    @property
    def model(self) -> bool:
        """Does the step to come train it?"""
        return self.d_steps == 0 or not self.discriminator


def perceptron(inputs: int, outputs: int, *, width: int, depth: int, dropout: float) -> nn.Sequential:
    """[N, inputs] -> [N, outputs]: `depth` linear layers, `width` units in each that is hidden, dropout on them."""
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [nn.Linear(inputs, width), nn.Dropout(dropout), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return features.view_as(features)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradient, None


def reverse(features: Tensor, weight: float) -> Tensor:
    """The features; their gradient is multiplied by -weight."""
    return _Reversal.apply(features, weight)


def squared_slope(logits: Tensor, domains: Tensor, inputs: Tensor) -> Tensor:
    """The mean over images of |d CE_i / d inputs_i|^2, 0-dim, with a graph: logits [N, D] of inputs [N, F]."""
    total = F.cross_entropy(logits, domains, reduction="sum")  # of one image each: no other has its inputs
    (gradient,) = torch.autograd.grad(total, inputs, create_graph=True)
    return gradient.square().sum(1).mean()
