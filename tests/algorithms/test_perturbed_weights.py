"""Weights that are moved and put back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gsdg.algorithms.elsewhere import elsewhere


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
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), elsewhere(model, weights):
        fail_at_other_weights(model)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_batchnorm_normalises_as_ever_and_keeps_its_statistics():
    """With a momentum, with a plain mean, without statistics, and frozen."""
    model, reference = network(), network()
    for layer, same in zip(model[1:], reference[1:], strict=True):
        before = copy.deepcopy(layer.state_dict())
        rows = torch.randn(6, 4)
        with elsewhere(model, list(model.parameters())):
            found = layer(rows)
        assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
        assert torch.equal(found, same(rows))
        layer(rows)  # afterwards it updates them again
        assert all(torch.equal(same.state_dict()[name], value) for name, value in layer.state_dict().items())
