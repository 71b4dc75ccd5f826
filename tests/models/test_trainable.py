"""Which parameters train: words and patterns, on a network with every kind of layer and on timm's ViT."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gsdg.models.classifier import Classifier
from gsdg.models.trainable import words_of
from gsdg.utils.errors import UserError


class Block(nn.Module):
    """A convolution, BatchNorm, self-attention over the positions, LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.mixer, self.after = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)

    def forward(self, images):
        tokens = self.scale(self.conv(images)).flatten(2).mT
        return self.after(self.mixer(tokens, tokens, tokens)[0].mean(1))


def block(weights):
    return Block(), 8


def vit(weights):
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}
    return timm.models.vision_transformer.VisionTransformer(**sizes), 12


def classifier(backbone=block, **options) -> Classifier:
    settings = {"head": "linear", "dropout": 0.0, "freeze_bn": False, "image_size": 16} | options
    return Classifier(backbone=backbone, weights=None, classes=4, mean=[0.0] * 3, std=[1.0] * 3, **settings)


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


HEAD = {"head.weight", "head.bias"}
NORMS = {f"featurizer.{layer}.{leaf}" for layer in ("scale", "after") for leaf in ("weight", "bias")}
MIXER = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
ATTENTION = {f"featurizer.mixer.{name}" for name in MIXER}
CONV = {"featurizer.conv.weight", "featurizer.conv.bias"}
BIASES = {name for name in ATTENTION | NORMS | CONV if name.endswith("bias")}
EVERY = HEAD | NORMS | ATTENTION | CONV


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, EVERY),
        ({"train_only": "all", "freeze": []}, EVERY),
        ({"train_only": "head"}, HEAD),
        ({"train_only": "attention"}, ATTENTION | HEAD),
        ({"train_only": "norm"}, NORMS | HEAD),
        ({"train_only": "bias"}, BIASES | HEAD),
        ({"train_only": "norm", "head": "none"}, NORMS),
        ({"train_only": ["norm"]}, NORMS),
        ({"train_only": ["norm", "head"]}, NORMS | HEAD),
        ({"train_only": ["featurizer.conv.*", "*.in_proj_bias"]}, CONV | {"featurizer.mixer.in_proj_bias"}),
        ({"freeze": ["featurizer.*"]}, HEAD),
        ({"freeze": ["head"]}, EVERY - HEAD),
        ({"freeze": ["bias", "*.conv.weight"]}, EVERY - BIASES - {"head.bias", "featurizer.conv.weight"}),
        ({"train_only": "norm", "freeze": ["featurizer.after.*", "head"]}, {n for n in NORMS if "scale" in n}),
    ],
)
def test_a_selection_trains_exactly_what_it_says(settings, expected):
    assert trained(classifier(**settings)) == expected


def test_attention_only_trains_what_domainbed_trains_in_timms_vits():
    """There: every parameter with `attn` in its name, and the classifier."""
    model = classifier(vit, train_only="attention")
    attention = {f"featurizer.{name}" for name, _ in model.featurizer.named_parameters() if "attn" in name}
    assert len(attention) == 2 * 4  # qkv and proj of two blocks, weight and bias
    assert trained(model) == attention | HEAD


def test_timms_own_normalisation_layers_count_as_such_and_wrappers_do_not():
    layers = pytest.importorskip("timm.layers")

    class PreNorm(nn.Sequential):
        pass

    class NormedLinear(nn.Linear):
        pass

    net = nn.ModuleDict(
        {
            "a": layers.RmsNorm(4),
            "b": layers.LayerNorm2d(4),
            "c": layers.BatchNormAct2d(4),
            "d": nn.InstanceNorm2d(4, affine=True),
            "e": PreNorm(nn.Linear(4, 4)),
            "f": NormedLinear(4, 4),
        }
    )
    of_norm = {name.split(".")[0] for name, words in words_of(net).items() if "norm" in words}
    assert of_norm == set("abcd")


def test_a_shared_parameter_has_the_words_of_its_first_name():
    model = classifier(train_only="norm")
    model.featurizer.again = model.head
    assert {name for name, words in words_of(model).items() if "head" in words} == set()
    assert not any("head." in name for name in words_of(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_only": "heads"}, r"model.train_only is 'heads'; valid: all, head, attention, norm, bias, or a list"),
        ({"train_only": ["featurizer.convs.*"]}, r"model.train_only: 'featurizer.convs.\*' selects no parameter.*conv"),
        ({"freeze": ["layer1.*"]}, r"model.freeze: 'layer1.\*' selects no parameter: the most similar names are feat"),
        ({"train_only": []}, r"train_only=\[\] and model.freeze=\[\] leave no parameter"),
        ({"train_only": "head", "freeze": ["head.*"]}, "leave no parameter of the model to train"),
        ({"train_only": "head", "head": "none"}, "'head' selects no parameter: model.head=none has no parameters"),
        ({"train_only": "attention", "backbone": lambda weights: (nn.Flatten(), 768)}, "no module called `attn`"),
        ({"freeze": ["norm"], "backbone": lambda weights: (nn.Flatten(), 768)}, "no normalisation layer with scale"),
    ],
)
def test_a_selection_of_nothing_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        classifier(**settings)


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_features_have_no_graph_while_only_the_head_trains():
    probe, whole = classifier(train_only="head"), classifier()
    assert not probe.featurize(images()).requires_grad
    assert whole.featurize(images()).requires_grad
    assert probe(images()).requires_grad


@pytest.mark.parametrize(
    ("settings", "moves"),
    [
        ({}, True),
        ({"freeze_bn": True}, False),
        ({"train_only": "head"}, False),
        ({"train_only": "attention"}, False),
        ({"train_only": "norm"}, True),
        ({"train_only": "bias"}, True),
        ({"freeze": ["featurizer.conv.*"]}, True),
        ({"freeze": ["featurizer.scale.*"]}, False),
    ],
)
def test_the_statistics_of_a_frozen_batchnorm_layer_do_not_move(settings, moves):
    model = classifier(**settings)
    (layer,) = (module for module in model.modules() if isinstance(module, _BatchNorm))
    for call in (lambda: None, model.eval, model.train):
        call()
        model(images())
    assert bool(layer.running_mean.any()) == bool(layer.num_batches_tracked) == moves


def test_batchnorm_without_affine_parameters_is_frozen_with_the_whole_backbone():
    def backbone(weights):
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.Flatten()), 6 * 14 * 14

    for settings, moves in [({}, True), ({"train_only": "head"}, False), ({"freeze": ["*.0.bias"]}, True)]:
        model = classifier(backbone, **settings)
        model(images())
        assert bool(model.featurizer[1].running_mean.any()) == moves, settings


def test_all_batchnorm_layers_hold_their_statistics_for_the_time_being():
    model = classifier()
    model.hold_statistics(True)
    model.train()
    model(images())
    assert not model.featurizer.scale.running_mean.any()
    model.hold_statistics(False)
    model(images())
    assert model.featurizer.scale.running_mean.any()
