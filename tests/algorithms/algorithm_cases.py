"""Helpers for the tests of algorithms: a small model, minibatches, and the gradients after `backward`."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import hydra
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import REPOSITORY
from torch import Tensor, nn

from gsdg.algorithms import Algorithm
from gsdg.config.schema import build
from gsdg.models import Classifier
from gsdg.plan import resolve_config
from gsdg.types import Batch
from gsdg.utils.errors import UserError

CLASSES, FEATURES, CHANNELS, SIZE = 5, 6, 3, 8


def backbone(weights: str | None) -> tuple[nn.Module, int]:
    """[B, 3, 8, 8] -> [B, 6]: two convolutions with GroupNorm, global average pooling, as in our convnet."""
    first, second = nn.Conv2d(CHANNELS, 4, 3, padding=1), nn.Conv2d(4, FEATURES, 3, stride=2, padding=1)
    blocks = [first, nn.ReLU(), nn.GroupNorm(2, 4), second, nn.ReLU(), nn.GroupNorm(2, FEATURES)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()), FEATURES


def classifier(dtype: torch.dtype = torch.float64, *, dropout: float = 0.0, seed: int = 0) -> Classifier:
    """A small model with the same weights in every call."""
    torch.manual_seed(seed)
    return around(backbone, dropout=dropout).to(dtype)


def around(make_backbone, channels: int = CHANNELS, size: int = SIZE, *, dropout: float = 0.0) -> Classifier:
    """A classifier with another backbone. make_backbone: as `backbone`."""
    options = {"freeze_bn": False, "image_size": size, "mean": [0.0] * channels, "std": [1.0] * channels}
    return Classifier(backbone=make_backbone, weights=None, classes=CLASSES, head="linear", dropout=dropout, **options)


def batches(domains: int = 3, images: int = 4, *, dtype: torch.dtype = torch.float64, seed: int = 1) -> list[Batch]:
    """`images` random images per domain with random labels; the domains differ in brightness and contrast."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(domains, images, CHANNELS, SIZE, SIZE, generator=generator, dtype=dtype)
    labels = torch.randint(CLASSES, (domains, images), generator=generator)
    shifted = [(1 + 0.3 * d) * x + 0.2 * d for d, x in enumerate(pixels)]
    return [Batch(x, y, f"domain {d}") for d, (x, y) in enumerate(zip(shifted, labels, strict=True))]


def unequal_batches(*sizes: int) -> list[Batch]:
    """A minibatch of each of these sizes."""
    return [batches(len(sizes), size)[d] for d, size in enumerate(sizes)]


def config_of(name: str, *overrides: str) -> dict:
    """The checked node `algorithm` of `algorithm=<name> <overrides>`."""
    return copy.deepcopy(_config_of((f"algorithm={name}", *overrides)))


@cache
def _config_of(overrides: tuple[str, ...]) -> dict:
    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return resolve_config(hydra.compose("config", [*overrides]))["algorithm"]


def made(name: str, *overrides: str) -> Algorithm:
    """`algorithm=<name> <overrides>` as launch.py builds it, before `setup`."""
    return build(config_of(name, *overrides))


def ready(algorithm: Algorithm, *, domains: int = 3, dtype: torch.dtype = torch.float64, **options) -> Algorithm:
    """The algorithm after `setup` with `classifier`; its additional modules get the same weights in every call."""
    torch.manual_seed(0)
    algorithm.setup(classifier(dtype, **options), [f"domain {d}" for d in range(domains)])
    return algorithm.to(dtype).train()


def seed_all(seed: int = 0) -> None:
    for seed_rng in (torch.manual_seed, np.random.seed, random.seed):
        seed_rng(seed)


def gradients(algorithm: Algorithm, data: Sequence[Batch], *, seed: int = 0) -> dict[str, Tensor]:
    """`.grad` of the model's parameters after one `backward`, by name, without those that are None."""
    seed_all(seed)
    algorithm.zero_grad(set_to_none=True)
    algorithm.backward(data)
    return {name: p.grad.clone() for name, p in algorithm.model.named_parameters() if p.grad is not None}


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of a loss with respect to the model's parameters, computed by autograd alone."""
    return slopes(dict(model.named_parameters()), loss)


def slopes(parameters: Mapping[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    """The gradient of a loss with respect to named parameters, without those that it does not depend on."""
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}


def risk(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of one minibatch."""
    return F.cross_entropy(model(batch.images), batch.labels)


def assert_same(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str = "", **tolerance: float
) -> None:
    assert actual.keys() == expected.keys(), what
    for name, value in expected.items():
        message = lambda text, name=name: f"{what} {name}: {text}"  # noqa: E731
        torch.testing.assert_close(actual[name], value, msg=message, **tolerance)


def assert_losses_average_to(whole: Tensor, algorithm: Algorithm, data: Sequence[Batch], model: nn.Module) -> None:
    """The mean of the domains' losses has the value and the gradient of `whole`, which `model` with equal weights gave.

    Gradient surgery needs this. One domain's loss alone has another gradient.
    """
    losses, _ = algorithm.losses(data)
    assert torch.stack(losses).mean().item() == pytest.approx(whole.item(), rel=1e-12)
    per_domain = [gradients_of(algorithm.model, loss) for loss in losses]
    expected = gradients_of(model, whole)
    means = {name: sum(grads[name] for grads in per_domain) / len(losses) for name in expected}
    assert_same(means, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(per_domain[0]["head.weight"], expected["head.weight"])


def assert_annealed(algorithm: Algorithm, data: Sequence[Batch], loss: Callable[[nn.Module, int], Tensor]) -> None:
    """Each of four steps has the gradient of loss(model, step). Adam's state is reset after the second."""
    optimizer = torch.optim.Adam(algorithm.parameter_groups(), lr=0.0)
    steps_of_adam = []
    for step in range(4):
        assert_same(gradients(algorithm, data), gradients_of(algorithm.model, loss(algorithm.model, step)))
        algorithm.step(optimizer)
        steps_of_adam.append(int(optimizer.state[algorithm.model.head.weight]["step"]))
    assert steps_of_adam == [1, 2, 1, 2]


def refusal(function: Callable, *arguments: object, **options: object) -> str:
    """The message of the UserError that the call raises."""
    try:
        function(*arguments, **options)
    except UserError as error:
        return str(error)
    pytest.fail(f"accepted: {function.__name__}({', '.join(map(str, arguments))}, {options})")
