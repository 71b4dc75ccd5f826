"""What the tests of algorithms share: a small real model, minibatches, and the gradient that an algorithm leaves."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsdg.algorithms import Algorithm
from gsdg.batch import Batch
from gsdg.experiment import resolved
from gsdg.models import Classifier
from gsdg.schema import build

CLASSES, FEATURES, CHANNELS, SIZE = 5, 6, 3, 8


def backbone(weights: str | None) -> tuple[nn.Module, int]:
    """[B, 3, 8, 8] -> [B, 6]: two convolutions with GroupNorm, global average pooling, as in our convnet."""
    first, second = nn.Conv2d(CHANNELS, 4, 3, padding=1), nn.Conv2d(4, FEATURES, 3, stride=2, padding=1)
    blocks = [first, nn.ReLU(), nn.GroupNorm(2, 4), second, nn.ReLU(), nn.GroupNorm(2, FEATURES)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()), FEATURES


def classifier(dtype: torch.dtype = torch.float64, *, dropout: float = 0.0, seed: int = 0) -> Classifier:
    """The same weights at every call."""
    torch.manual_seed(seed)
    options = {"dropout": dropout, "freeze_bn": False, "image_size": SIZE, "mean": [0.0] * 3, "std": [1.0] * 3}
    return Classifier(backbone=backbone, weights=None, classes=CLASSES, head="linear", **options).to(dtype)


def batches(domains: int = 3, images: int = 4, *, dtype: torch.dtype = torch.float64, seed: int = 1) -> list[Batch]:
    """`images` random images a domain, of domains that differ in brightness and contrast; labels of all classes."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(domains, images, CHANNELS, SIZE, SIZE, generator=generator, dtype=dtype)
    labels = torch.randint(CLASSES, (domains, images), generator=generator)
    shifted = [(1 + 0.3 * d) * x + 0.2 * d for d, x in enumerate(pixels)]
    return [Batch(x, y, f"domain {d}") for d, (x, y) in enumerate(zip(shifted, labels, strict=True))]


def made(compose, name: str, *overrides: str, seed: int = 0) -> Algorithm:
    """`algorithm=<name> <overrides>` as launch.py would build it, not set up. `compose` is the fixture."""
    return build(resolved(compose(f"algorithm={name}", *overrides))["algorithm"])


def ready(algorithm: Algorithm, *, domains: int = 3, dtype: torch.dtype = torch.float64, **options) -> Algorithm:
    """Set up with `classifier`; modules of its own get the same weights at every call."""
    torch.manual_seed(0)
    algorithm.setup(classifier(dtype, **options), [f"domain {d}" for d in range(domains)])
    return algorithm.to(dtype).train()


def seed_all(seed: int = 0) -> None:
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)


def gradients(algorithm: Algorithm, data: Sequence[Batch], *, seed: int = 0) -> dict[str, Tensor]:
    """What one `backward` leaves in `.grad` of the model's parameters, by name; nothing where that stays None."""
    seed_all(seed)
    algorithm.zero_grad(set_to_none=True)
    algorithm.backward(data)
    return {name: p.grad.clone() for name, p in algorithm.model.named_parameters() if p.grad is not None}


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of a loss in the model's parameters, by autograd alone."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def risk(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of one minibatch."""
    return F.cross_entropy(model(batch.images), batch.labels)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def assert_losses_average_to(whole: Tensor, algorithm: Algorithm, data: Sequence[Batch], model: nn.Module) -> None:
    """The mean of the domains' losses has the value and the gradient of `whole`, made with `model` of equal weights.

    One domain's loss alone has another gradient.
    """
    losses, _ = algorithm.losses(data)
    assert torch.stack(losses).mean().item() == pytest.approx(whole.item(), rel=1e-12)
    parameters = dict(algorithm.model.named_parameters())
    own = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in losses]
    expected = gradients_of(model, whole)
    means = {name: sum(grads) / len(losses) for name, *grads in zip(parameters, *own, strict=True)}
    assert_same(means, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(own[0][-2], expected["head.weight"])
