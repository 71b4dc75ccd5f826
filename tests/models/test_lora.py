"""LoRA through peft: what trains, the output at the start and after an update by hand, and what is refused."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from test_trainable import block, classifier, images, trained, vit
from torch import nn

from gsdg.algorithms import ERM
from gsdg.averaging.weights import WeightMean, Weights, with_mean
from gsdg.models.classifier import Classifier
from gsdg.surgery import PerTensor, Surgery
from gsdg.surgery.rules import PCGrad
from gsdg.utils.errors import UserError


def lora(**settings) -> Classifier:
    pytest.importorskip("peft", reason="pip install 'gsdg[lora]'")
    torch.manual_seed(0)
    return classifier(vit, **{"lora": 3} | settings)


MATRICES = {
    f"featurizer.blocks.{k}.attn.{layer}.lora_{matrix}.default.weight"
    for k in (0, 1)
    for layer in ("qkv", "proj")
    for matrix in "AB"
}
HEAD = {"head.weight", "head.bias"}


def test_the_matrices_of_the_attention_blocks_train_and_the_head():
    model = lora()
    assert trained(model) == MATRICES | HEAD
    layer = model.featurizer.blocks[0].attn.qkv
    assert layer.lora_A.default.weight.shape == (3, 12)
    assert layer.lora_B.default.weight.shape == (36, 3)
    chosen = lora(lora_layers=["*.1.mlp.fc1.weight", "*.1.mlp.fc1.bias"], freeze=["head.bias"])
    fc1 = {f"featurizer.blocks.1.mlp.fc1.lora_{matrix}.default.weight" for matrix in "AB"}
    assert trained(chosen) == fc1 | {"head.weight"}


def test_at_the_start_the_output_is_the_networks_and_later_that_of_w_plus_b_a():
    torch.manual_seed(0)
    plain, model = classifier(vit).eval(), lora().eval()
    torch.testing.assert_close(model.featurize(images()), plain.featurize(images()), rtol=0, atol=0)
    for k in (0, 1):
        for name in ("qkv", "proj"):
            layer = model.featurizer.blocks[k].attn.get_submodule(name)
            torch.nn.init.normal_(layer.lora_B.default.weight)
            whole = layer.base_layer.weight + layer.lora_B.default.weight @ layer.lora_A.default.weight
            plain.featurizer.blocks[k].attn.get_submodule(name).weight.data.copy_(whole)
    torch.testing.assert_close(model.featurize(images()), plain.featurize(images()), rtol=1e-4, atol=1e-5)


def test_an_update_changes_the_matrices_and_the_head_and_no_other_weight():
    model = lora()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(2):  # A has no gradient while B is 0
        optimizer.zero_grad()
        model(images()).logsumexp(1).mean().backward()
        optimizer.step()
    assert {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])} == MATRICES | HEAD


def test_gradient_surgery_has_parts_for_the_matrices_and_an_average_is_of_them():
    model = lora()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert {*Surgery(named, PerTensor(), PCGrad()).names} == MATRICES | HEAD
    algorithm = ERM()
    algorithm.setup(model, ["a", "b"])
    weights = Weights(algorithm)
    mean = WeightMean(weights())
    mean.add(weights(), 1.0, start=0, end=0)
    averaged = with_mean(algorithm, weights, mean).eval()
    assert torch.equal(averaged.predict(images()), algorithm.eval().predict(images()))


def test_statistics_of_batchnorm_do_not_move_with_lora():
    pytest.importorskip("peft", reason="pip install 'gsdg[lora]'")

    def backbone(weights):
        inner = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.Linear(8, 8))  # its linear layer is called 4.3
        return nn.Sequential(nn.Conv2d(3, 2, 9), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(128, 8), inner), 8

    model = classifier(backbone, lora=2, lora_layers=["featurizer.3.weight"])
    assert trained(model) == {f"featurizer.3.lora_{matrix}.default.weight" for matrix in "AB"} | HEAD
    model(images())
    assert not model.featurizer[1].running_mean.any()


def test_settings_that_cannot_work_are_refused(monkeypatch):
    for settings, message in [
        ({"lora": -1}, "model.lora is a rank, 1 or more, or 0 for none; found -1"),
        ({"lora_layers": ["*.weight"]}, "model.lora_layers is of no use without a rank: set model.lora=8, or leave it"),
        (
            {"lora": 2, "train_only": "norm"},
            "model.lora=2 trains its own matrices and the head: leave model.train_only",
        ),
        ({"lora": 2, "lora_layers": ["*.fc9.*"]}, "model.lora_layers: '*.fc9.*' selects no parameter"),
        ({"lora": 2, "lora_layers": ["norm"]}, "selects no weight of a linear layer (nn.Linear) of the backbone"),
        ({"lora": 2, "lora_layers": ["head"]}, "selects no weight of a linear layer (nn.Linear) of the backbone"),
        ({"lora": 2, "backbone": block}, "selects no weight of a linear layer"),  # inside nn.MultiheadAttention
    ]:
        with pytest.raises(UserError) as caught:
            classifier(**{"backbone": vit} | settings)
        assert message in str(caught.value)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"needs the package peft, which is not installed: pip install 'gsdg\[lora\]'"):
        classifier(vit, lora=2)
