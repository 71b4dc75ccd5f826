"""`optimizer.groups` and `optimizer.layer_decay`: config -> the groups of torch's optimizer -> the update -> resume."""

from __future__ import annotations

import json

import pytest
import torch
from algorithm_cases import batches, made, ready, refusal
from harness import compose_tiny, first_difference, observe

from gsdg import optimizer_groups
from gsdg.optimizer_groups import build_optimizer, layer_scales, pop_refinements, with_fused
from gsdg.plan import prepare
from gsdg.utils.errors import UserError

ADAM = {"_target_": "torch.optim.AdamW", "lr": 0.01, "weight_decay": 0.3}
NORMS = {f"featurizer.{layer}.{leaf}" for layer in (2, 5) for leaf in ("weight", "bias")}


def settings(algorithm, **refinements) -> dict[str, tuple[float, float, float]]:
    """{parameter: (lr, weight decay, lr_scale) in torch's optimizer}, each parameter in one group."""
    optimizer = build_optimizer(ADAM | refinements, algorithm)
    names = {id(p): name.removeprefix("model.") for name, p in algorithm.named_parameters()}
    rows = [
        (names[id(p)], (group["lr"], group["weight_decay"], group.get("lr_scale", 1.0)))
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(rows) == len({name for name, _ in rows}) == sum(p.requires_grad for p in algorithm.parameters())
    return dict(rows)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "cpu", "meta"])
def test_on_cuda_torchs_optimizers_use_their_fused_kernels_unless_others_are_chosen(device):
    device = torch.device(device)
    assert with_fused(ADAM, device).get("fused") == (True if device.type == "cuda" else None)
    for chosen in ({"fused": False}, {"foreach": True}):
        assert with_fused(ADAM | chosen, device) == ADAM | chosen
    without = {"_target_": "torch.optim.RMSprop", "lr": 0.1}
    assert with_fused(without, device) == without


def test_the_optimizer_is_built_for_the_device_of_the_algorithm(monkeypatch):
    seen = []
    monkeypatch.setattr(optimizer_groups, "with_fused", lambda node, device: seen.append(device) or node | {"lr": 0.5})
    assert build_optimizer(ADAM, ready(made("erm"))).param_groups[0]["lr"] == 0.5
    assert seen == [torch.device("cpu")]


def test_each_parameter_has_the_settings_of_the_first_group_that_selects_it():
    groups = [
        {"match": ["featurizer.0.*"], "lr": 0.0},
        {"match": ["head", "*.3.weight"], "lr": 10},
        {"match": ["norm", "bias"], "weight_decay": 0.0},
    ]
    of = settings(ready(made("erm")), groups=groups)
    assert of["featurizer.0.weight"] == of["featurizer.0.bias"] == (0.0, 0.3, 0.0)
    assert of["head.weight"] == of["head.bias"] == of["featurizer.3.weight"] == (pytest.approx(0.1), 0.3, 10.0)
    assert {name for name, values in of.items() if values == (0.01, 0.0, 1.0)} == NORMS | {"featurizer.3.bias"}
    assert set(settings(ready(made("erm"))).values()) == {(0.01, 0.3, 1.0)}


def test_a_factor_multiplies_the_learning_rate_that_the_algorithm_asks_for():
    """DANN's discriminator has a learning rate and a weight decay of its own."""
    dann = ready(made("dann", "algorithm.discriminator_lr=0.5", "algorithm.discriminator_weight_decay=0.25"))
    of = settings(
        dann, groups=[{"match": ["*.0.weight"], "lr": 2}, {"match": ["discriminator.0.bias"], "weight_decay": 0}]
    )
    assert of["featurizer.0.weight"] == (0.02, 0.3, 2.0)
    assert of["discriminator.0.weight"] == (1.0, 0.25, 2.0)
    assert of["discriminator.0.bias"] == (0.5, 0.0, 1.0)
    assert of["head.bias"] == (0.01, 0.3, 1.0)
    groups = build_optimizer(ADAM | {"groups": [{"match": ["head"], "lr": 2}]}, dann).param_groups
    assert [tuple(group["betas"]) for group in groups] == [dann.betas["betas"]] * 3


def test_eqrms_final_learning_rate_is_multiplied_too():
    algorithm = ready(made("eqrm", "algorithm.anneal_steps=1", "algorithm.final_lr=0.004"))
    optimizer = build_optimizer(ADAM | {"groups": [{"match": ["head"], "lr": 10}]}, algorithm)
    for _ in range(2):
        algorithm.zero_grad()
        algorithm.backward(batches())
        algorithm.step(optimizer)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.004, pytest.approx(0.04)]


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "resnet18", "tf_efficientnet_lite0", "convnext_atto"])
def test_layer_decay_gives_a_network_without_head_timms_factors_for_the_network_with_its_head(arch):
    timm, optim = pytest.importorskip("timm"), pytest.importorskip("timm.optim")
    whole, headless = timm.create_model(arch, num_classes=7), timm.create_model(arch, num_classes=0)
    groups = optim.param_groups_layer_decay(whole, layer_decay=0.5)
    names = {id(p): name for name, p in whole.named_parameters()}
    expected = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    scales = layer_scales(headless, 0.5)
    found = {name: scales[id(p)] for name, p in headless.named_parameters()}
    assert found == {name: expected[name] for name in found}
    assert len(set(found.values())) > 5
    assert 1.0 not in {found[name] for name in found if "norm" not in name}, "the layer of the head is after all others"


def test_layer_decay_and_groups_multiply_and_leave_weight_decay_alone():
    timm = pytest.importorskip("timm")
    algorithm = ready(made("erm"), dtype=torch.float32)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}
    algorithm.model.featurizer = timm.models.vision_transformer.VisionTransformer(**sizes)
    algorithm.model.featurizer.blocks[0].attn.requires_grad_(False)
    of = settings(algorithm, layer_decay=0.5, groups=[{"match": ["*.bias"], "lr": 3}])
    rates = {name: lr / 0.01 for name, (lr, _, _) in of.items()}
    assert rates["featurizer.cls_token"] == pytest.approx(1 / 8)
    assert rates["featurizer.blocks.0.mlp.fc1.weight"] == pytest.approx(1 / 4)
    assert rates["featurizer.blocks.1.attn.qkv.weight"] == rates["featurizer.norm.weight"] == pytest.approx(1 / 2)
    assert rates["featurizer.blocks.1.attn.qkv.bias"] == pytest.approx(3 / 2)
    assert rates["head.weight"] == 1
    assert rates["head.bias"] == pytest.approx(3)
    assert {decay for _, decay, _ in of.values()} == {0.3}


def test_a_group_of_no_effect_is_refused_and_a_network_without_layers():
    for groups, message in [
        ([{"match": ["fc.*"]}], r"optimizer.groups[0].match: 'fc.*' selects no parameter: the most similar names are "),
        (
            [{"match": ["attention"]}],
            "optimizer.groups[0].match: 'attention' selects no parameter: the network has no ",
        ),
        ([{"match": ["head"]}, {"match": ["head.*"]}], "optimizer.groups[1].match=['head.*'] has no effect: earlier "),
        ([{"match": ["*.0.bias"]}], "optimizer.groups[0].match=['*.0.bias'] has no effect: none of its parameters tr"),
    ]:
        algorithm = ready(made("erm"))
        algorithm.model.featurizer[0].requires_grad_(False)
        assert message in refusal(build_optimizer, ADAM | {"groups": groups}, algorithm)
    message = refusal(build_optimizer, ADAM | {"layer_decay": 0.7}, ready(made("erm")))
    assert "optimizer.layer_decay=0.7: this network (Sequential) does not say what its layers are" in message
    rprop = {"_target_": "torch.optim.Rprop", "groups": [{"match": ["head"], "weight_decay": 0.0}]}
    assert "torch.optim.Rprop has no weight_decay" in refusal(build_optimizer, rprop, ready(made("erm")))


def test_a_mistake_in_a_group_is_refused_before_data_loads():
    for key, value, message in [
        (
            "groups",
            [{"match": ["head"], "lrr": 1}],
            "unknown key optimizer.groups[0].lrr. Did you mean `lr`? Valid here",
        ),
        ("groups", [{"lr": 1}], "optimizer.groups[0].match is missing"),
        (
            "groups",
            [{"match": "head"}],
            "optimizer.groups[0].match: found 'head' (str), expected a list, such as [a, b].",
        ),
        ("groups", [{"match": ["head"], "lr": "x"}], "optimizer.groups[0].lr: found 'x' (str), expected float."),
        (
            "groups",
            [{"match": ["head"], "lr": -1.0}],
            "optimizer.groups.lr: found -1.0, expected a number in [0, inf).",
        ),
        ("groups", [{"match": []}], "found match=[], expected one or more name patterns"),
        ("groups", ["head"], "optimizer.groups[0]: found 'head', expected a group such as {match: [head], lr: 10}."),
        ("groups", {"match": ["head"]}, "optimizer.groups: found {'match': ['head']}, expected a list of groups"),
        ("groups", [{"match": ["nothing*"]}], "optimizer.groups[0].match: 'nothing*' selects no parameter"),
        ("layer_decay", 1.5, "optimizer.layer_decay: found 1.5, expected a number in (0, 1]."),
        ("layer_decay", "x", "optimizer.layer_decay: found 'x' (str), expected float or null."),
        ("layer_decay", 0.7, "does not say what its layers are"),
    ]:
        assert message in refusal(prepare, compose_tiny(**{f"optimizer.{key}": value})), value


def test_what_changes_nothing_changes_no_id_and_what_does_is_in_the_config():
    plain = prepare(compose_tiny())
    for unused in ({"groups": []}, {"layer_decay": None}, {"layer_decay": 1.0}):
        same = prepare(compose_tiny(**{f"optimizer.{key}": value for key, value in unused.items()}))
        assert same.run_id == plain.run_id
        assert {"groups", "layer_decay"}.isdisjoint(same.config["optimizer"])
    groups = [{"match": ["head"], "lr": 10}]
    plan = prepare(compose_tiny(**{"optimizer.groups": groups}))
    assert plan.run_id != plain.run_id
    assert plan.config["optimizer"]["groups"] == groups
    again = prepare(json.loads(json.dumps(plan.config)))
    assert (again.run_id, again.config) == (plan.run_id, plan.config)


def test_groups_change_the_first_update_and_nothing_before_it():
    plain = observe()
    for groups in ([{"match": ["head"], "lr": 10}], [{"match": ["bias"], "weight_decay": 0.5}]):
        run = observe(**{"optimizer.groups": groups})
        assert first_difference(plain, run) == "weights"
    slow = observe(**{"optimizer.groups": [{"match": ["featurizer.*"], "lr": 0}]})
    for name, start in slow.weights[0].items():
        assert torch.equal(slow.weights[-1][name], start) == name.startswith("model.featurizer."), name
    assert len(slow.optimizer.param_groups) == 2


def test_a_resumed_optimizer_has_its_groups_to_the_bit():
    node = ADAM | {"groups": [{"match": ["head"], "lr": 10}, {"match": ["norm"], "weight_decay": 0.0}]}

    def start():
        algorithm = ready(made("dann"), dtype=torch.float32)
        return algorithm, build_optimizer(node, algorithm)

    def train(algorithm, optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            algorithm.backward(batches(dtype=torch.float32))
            algorithm.step(optimizer)

    whole, first, second = start(), start(), start()
    train(*whole, 6)
    train(*first, 3)
    for part, before in zip(second, first, strict=True):
        part.load_state_dict(before.state_dict())
    train(*second, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True))
    assert [group["lr"] for group in second[1].param_groups] == [group["lr"] for group in whole[1].param_groups]


def test_a_group_is_taken_out_of_the_node_of_torchs_optimizer():
    node = {"lr": 1.0, "groups": [{"match": ["head"]}], "layer_decay": 0.5}
    assert pop_refinements(node) == {"groups": [{"match": ["head"]}], "layer_decay": 0.5}
    assert node == {"lr": 1.0}
    with pytest.raises(UserError):
        pop_refinements({"layer_decay": 0.0})
