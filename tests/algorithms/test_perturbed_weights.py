"""Weights that are perturbed and restored."""

from __future__ import annotations

import copy

import pytest
import torch
from algorithm_cases import batches, gradients, made, ready
from torch import nn

from gsdg.algorithms.common.perturbed_weights import restored_afterwards


def network() -> nn.Module:
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(4, track_running_stats=False)]
    model = nn.Sequential(nn.Linear(3, 4), *norms, nn.BatchNorm1d(4))
    model.train()[-1].eval()
    return model


@torch.no_grad()
def fail_at_other_weights(model: nn.Module) -> None:
    for p in model.parameters():
        p.add_(1e-3).div_(3)
    model(torch.randn(6, 5))


def test_weights_are_put_back_bit_for_bit_even_after_an_error():
    model = network()
    before = copy.deepcopy(model.state_dict())
    weights = list(model.parameters())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), restored_afterwards(model, weights):
        fail_at_other_weights(model)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_batchnorm_normalizes_as_before_and_keeps_its_statistics():
    """BatchNorm with momentum, with a plain mean, without running statistics, and frozen."""
    model, reference = network(), network()
    for layer, same in zip(model[1:], reference[1:], strict=True):
        before = copy.deepcopy(layer.state_dict())
        rows = torch.randn(6, 4)
        with restored_afterwards(model, list(model.parameters())):
            normalized = layer(rows)
        assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
        assert torch.equal(normalized, same(rows))
        layer(rows)  # afterwards it updates them again
        assert all(torch.equal(same.state_dict()[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_algorithm_that_perturbs_weights_puts_them_back_bit_for_bit(dtype):
    for name in ("mldg", "sagm", "sam"):
        algorithm = ready(made(name), dtype=dtype)
        before = {key: value.clone() for key, value in algorithm.state_dict().items()}
        gradients(algorithm, batches(dtype=dtype))
        assert all(torch.equal(value, before[key]) for key, value in algorithm.state_dict().items()), name
