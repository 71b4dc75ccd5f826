"""The heads against the same computation by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gsdg.models.heads import SCALE, make_head
from gsdg.utils.errors import UserError

FEATURES = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))


def test_mlp_is_domainbeds_nonlinear_classifier():
    """Three linear layers of widths F // 2, F // 4 and the classes, with ReLU between them."""
    head = make_head("mlp", 10, 3)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    widths = {"0.weight": (5, 10), "0.bias": (5,), "2.weight": (2, 5), "2.bias": (2,)}
    assert shapes == widths | {"4.weight": (3, 2), "4.bias": (3,)}
    a, b, c, d, e, f = head.parameters()
    by_hand = ((FEATURES @ a.T + b).clamp(min=0) @ c.T + d).clamp(min=0) @ e.T + f
    torch.testing.assert_close(head(FEATURES), by_hand)
    with pytest.raises(UserError, match=r"model.head=mlp needs 4 features or more, found 3"):
        make_head("mlp", 3, 3)


def test_cosine_is_a_trained_scale_times_the_cosine_with_each_classs_weight():
    head = make_head("cosine", 10, 3)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {"weight": (3, 10), "scale": ()}
    assert head.scale == SCALE == 10
    with torch.no_grad():
        head.scale.fill_(7.0)
    for row, logits in zip(FEATURES, head(FEATURES), strict=True):
        for weight, logit in zip(head.weight, logits, strict=True):
            torch.testing.assert_close(logit, 7 * row @ weight / (row.norm() * weight.norm()))
    torch.testing.assert_close(head(100 * FEATURES), head(FEATURES))
    head(FEATURES).logsumexp(1).sum().backward()
    assert head.scale.grad.abs() > 0
    assert head.weight.grad.abs().sum() > 0


def test_features_of_zeros_have_logits_of_zero_and_bounded_gradients():
    features = torch.zeros(2, 10, requires_grad=True)
    logits = make_head("cosine", 10, 3)(features)
    logits.sum().backward()
    assert not logits.any()
    assert features.grad.isfinite().all()
    assert features.grad.abs().max() < 1e8


def test_linear_is_initialised_as_before_there_were_other_heads():
    torch.manual_seed(3)
    before = nn.Linear(10, 3)
    torch.manual_seed(3)
    head = make_head("linear", 10, 3)
    assert type(head) is nn.Linear
    assert torch.equal(head.weight, before.weight)
    assert isinstance(make_head("none", 10, 10), nn.Identity)
    with pytest.raises(UserError, match="10 features as logits, but the data set has 11 classes"):
        make_head("none", 10, 11)
