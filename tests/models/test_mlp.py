"""The small head on stored features."""

from __future__ import annotations

import pytest
import torch

from gsdg.errors import UserError
from gsdg.models import mlp


def test_it_is_one_hidden_layer_on_the_flattened_image():
    net, features = mlp(None, inputs=12, width=5)
    images = torch.randn(7, 3, 2, 2)
    layer = net[1]
    expected = (images.reshape(7, 12) @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(net(images), expected)
    assert features == 5


def test_no_width_is_refused():
    with pytest.raises(UserError, match="found inputs=12 and width=0"):
        mlp(None, inputs=12, width=0)
