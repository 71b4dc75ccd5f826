"""What the tests of DANN and CDANN share: the game image by image, and the gradients that a step leaves each player."""

from __future__ import annotations

import torch
from algorithm_cases import gradients, risk
from torch import Tensor

OPTIONS = {
    "adversary_weight": 0.7,
    "d_steps_per_g_step": 1,
    "grad_penalty": 0.0,
    "beta1": 0.5,
    "discriminator_lr": None,
    "discriminator_weight_decay": None,
    "mlp_width": 7,
    "mlp_depth": 3,
    "mlp_dropout": 0.0,
}


def disc_loss(algorithm, data, weight_of, added, penalty: float) -> Tensor:
    """U: over images of domain d and class y, sum of weight_of(y) CE, and the mean squared slope times `penalty`.

    added(y) [F] is what the discriminator sees on top of the features.
    """
    total, slopes = 0, []
    for d, batch in enumerate(data):
        for image, y in zip(batch.images, batch.labels, strict=True):
            seen = algorithm.model.featurize(image[None])[0] + added(y)
            logits = algorithm.discriminator(seen)
            loss = logits.exp().sum().log() - logits[d]
            (slope,) = torch.autograd.grad(loss, seen, create_graph=True)
            total, slopes = total + weight_of(y) * loss, [*slopes, (slope**2).sum()]
    return total + penalty * sum(slopes) / len(slopes)


def nll(algorithm, data) -> Tensor:
    images = sum(len(batch.labels) for batch in data)
    return sum(len(batch.labels) * risk(algorithm.model, batch) for batch in data) / images


def both_gradients(algorithm, data) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What one `backward` leaves the model and its adversary."""
    return gradients(algorithm, data), {
        name: p.grad.clone() for name, p in adversary_of(algorithm).items() if p.grad is not None
    }


def adversary_of(algorithm) -> dict[str, Tensor]:
    return {name: p for name, p in algorithm.named_parameters() if not name.startswith("model.")}


def slopes_of(named: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}
