from __future__ import annotations

import pytest
import torch
from torch import nn

from gsdg.models.classifier import Classifier, image_spec
from gsdg.types import ImageSpec
from gsdg.utils.errors import UserError

SPEC = ImageSpec(8, 3, (0.0,) * 3, (1.0,) * 3)


def tiny(**changes) -> Classifier:
    body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    settings = {"classes": 4, "head": "linear", "dropout": 0.0, "freeze_bn": False, "precision": "float32"} | changes
    images = {"image_size": SPEC.size, "mean": SPEC.mean, "std": SPEC.std}
    return Classifier(backbone=lambda weights: (body, 6), weights=None, **images, **settings)


def images() -> torch.Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_frozen_batchnorm_keeps_its_statistics_while_its_affine_part_trains():
    for call_train in (False, True):
        model = tiny(freeze_bn=True)
        if call_train:
            model.eval()
            model.train()
        batchnorm = model.featurizer[1]
        assert model.training
        assert not batchnorm.training
        model(images()).square().sum().backward()
        assert batchnorm.running_mean.eq(0).all()
        assert batchnorm.running_var.eq(1).all()
        assert batchnorm.weight.grad.abs().sum() > 0
        assert batchnorm.bias.grad.abs().sum() > 0
    model = tiny()  # unfrozen, it moves in training only
    model.eval()(images())
    assert model.featurizer[1].running_mean.eq(0).all()
    model.train()(images())
    assert model.featurizer[1].running_mean.ne(0).all()


def test_the_head_is_one_linear_map_of_the_features_or_none():
    model = tiny(head="none").eval()
    assert torch.equal(model(images()), model.featurizer(images()))
    assert model(images()).shape == tiny(head="none", classes=6).eval()(images()).shape == (5, 6)
    model = tiny().eval()
    logits = model.featurize(images()) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images()), logits)
    assert logits.shape == (5, 4)


def test_dropout_acts_on_the_features_and_only_in_training():
    model = tiny(dropout=0.5, freeze_bn=True)
    whole = model.eval().featurize(images())
    assert torch.equal(whole, model.featurizer(images()))
    dropped = model.train().featurize(images())
    zeroed = dropped.eq(0) & whole.ne(0)
    assert zeroed.any()
    torch.testing.assert_close(dropped[~zeroed], 2 * whole[~zeroed])


def test_bf16_computes_in_bfloat16_and_returns_float32_logits():
    model, same = tiny(precision="bf16").eval(), tiny().eval()
    same.load_state_dict(model.state_dict())
    seen = []
    model.featurizer[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    logits = model(images())
    assert seen == [torch.bfloat16]
    assert logits.dtype == model.featurize(images()).dtype == torch.float32
    torch.testing.assert_close(logits, same(images()), atol=0.03, rtol=0.03)


def test_wrong_settings_and_image_specs_are_named():
    for changes, message in (
        ({"dropout": 1.0}, r"model.dropout .* \[0, 1\), found 1.0"),
        ({"dropout": -0.1}, r"found -0.1"),
        ({"dropout": float("nan")}, r"found nan"),
        ({"head": "tree"}, "head 'tree' is unknown; valid: linear, none, mlp, cosine"),
        ({"precision": "fp8"}, "precision 'fp8' is unknown; valid: float32, bf16, fp16"),
        ({"head": "none", "classes": 7}, "6 features as logits, but the data set has 7 classes"),
    ):
        with pytest.raises(UserError, match=message):
            tiny(**changes)
    settings = {"size": 8, "mean": [0.0] * 3, "std": [1.0] * 3}
    assert image_spec(**settings) == SPEC
    for changes, message in (
        ({"mean": [0.5]}, r"need one number per channel, 1 .* 2 .* or 3 .*, found \[0.5\]"),
        ({"mean": [0.5] * 4, "std": [1.0] * 4}, "need one number per channel"),
        ({"std": [1.0, 1.0]}, "need one number per channel"),
        ({"std": [1.0, 0.0, 1.0]}, "model.std needs positive numbers"),
        ({"size": 0}, "model.image_size"),
    ):
        with pytest.raises(UserError, match=message):
            image_spec(**(settings | changes))
