"""Any architecture of timm: its images, features and weights are timm's own, and mistakes are named."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from algorithm_cases import refusal

from gsdg.models import timm_model
from gsdg.models.timm_model import file_names, pretrained_cfg
from gsdg.plan import prepare
from gsdg.utils.errors import UserError

timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'gsdg[backbones]'")
PHOTOS = ("dataset=pacs", "split.target=photo")


@pytest.fixture
def plan(compose):
    return lambda *overrides: prepare(compose(*PHOTOS, *overrides))


@pytest.fixture
def refused(compose):
    return lambda *overrides: refusal(prepare, compose(*PHOTOS, *overrides))


# ---- what timm says about an architecture ---------------------------------------------------------------------------


def test_size_mean_and_std_come_from_timm_and_are_in_the_run_id(plan):
    chosen = ("model=timm", "model.arch=vit_small_patch16_224")
    run = plan(*chosen)
    numbers = {"image_size": 224, "mean": [0.5] * 3, "std": [0.5] * 3}
    assert {key: run.config["model"][key] for key in numbers} == numbers
    assert run.config["model"]["name"] == "timm/vit_small_patch16_224"
    assert run.config["model"]["backbone"]["image_size"] == 224
    assert "arch" not in run.config["model"]
    same = plan(*chosen, *(f"model.{key}={value}" for key, value in numbers.items()))
    assert same.run_id == run.run_id
    assert prepare(run.config).config == run.config
    others = ["model.image_size=128", "model.mean=[0.4,0.5,0.5]", "model.arch=vit_small_patch16_224.dino"]
    assert len({plan(*chosen, other).run_id for other in others} | {run.run_id}) == 4
    dino = plan("model=timm", "model.arch=vit_base_patch14_dinov2.lvd142m").config["model"]
    assert (dino["image_size"], dino["mean"]) == (518, [0.485, 0.456, 0.406])
    clip = plan("model=timm", "model.arch=vit_base_patch16_clip_224.openai", "model.image_size=96").config["model"]
    assert (clip["image_size"], clip["backbone"]["image_size"], clip["mean"][0]) == (96, 96, 0.48145466)


def test_the_number_of_features_is_that_of_the_output_in_every_family():
    """MobileNetV3 has a layer between its pooling and its classifier: 1280 features, where num_features is 960."""
    families = {
        ("mobilenetv3_small_050", 32): 1024,
        ("resnet50_clip.openai", 64): 2048,
        ("vit_small_patch14_dinov2.lvd142m", 28): 384,
        ("vit_tiny_patch16_224", 32): 192,
        ("convnext_atto", 32): 320,
        ("swin_tiny_patch4_window7_224", 64): 768,
        ("eva02_tiny_patch14_224", 28): 192,
        ("regnety_002", 32): 368,
        ("test_maxvit", 64): 128,
    }
    for (arch, size), expected in families.items():
        with torch.device("meta"):  # shapes without numbers
            net, features = timm_model(None, arch=arch, image_size=size)
            assert net(torch.empty(2, 3, size, size)).shape == (2, features), arch
        assert features == expected, arch


def test_the_first_layer_has_the_channels_of_the_images(plan, refused):
    net, features = timm_model(None, arch="test_vit", image_size=32, channels=1)
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, features)
    digits = ("dataset=rotated_digits", "split.target=15", "model=timm", "model.arch=test_vit", "model.image_size=32")
    grey = ("model.backbone.channels=1", "model.mean=[0.5]", "model.std=[0.5]")
    assert plan(*digits, *grey).config["model"]["mean"] == [0.5]
    assert re.search(r"channels=1, but model\.mean has 3 numbers, that the weights expect, .* set model\.mean and ",
                     refused(*digits, grey[0]))  # fmt: skip
    assert "model.backbone.channels=3, but model.mean has 1 numbers, [0.5]: " in refused(*digits, *grey[1:])


def test_the_names_of_files_on_the_hub_are_timms():
    from timm.models._hub import HF_WEIGHTS_NAME, _get_safe_alternatives

    for name in (None, "open_clip_pytorch_model.bin", "other.bin"):
        default = name or HF_WEIGHTS_NAME
        assert file_names(name) == (*_get_safe_alternatives(default), default)
    assert file_names("x.safetensors") == ("x.safetensors",)


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_an_unknown_architecture_or_tag_is_refused_with_near_names(refused):
    message = refused("model=timm", "model.arch=vit_smal_patch16_224")
    assert re.search(r"no architecture vit_smal_patch16_224\. Near names: vit_small_patch16_224, ", message)
    message = refused("model=timm", "model.arch=vit_small_patch16_224.dinov9")
    assert re.search(r"no weights dinov9 for vit_small_patch16_224\. Valid: .*vit_small_patch16_224\.dino[,.]", message)
    assert "no architecture [1]" in refused("model=timm", "model.arch=[1]")


def test_a_model_without_an_architecture_is_refused_with_a_command_that_works(refused, plan):
    for model in ("timm", "torchvision"):
        message = refused(f"model={model}")
        assert message.startswith("model.arch is missing")
        command = re.search(rf"model={model} model\.arch=\w+", message)[0]
        assert plan(*command.split()).config["model"]["backbone"]["arch"] == command.rpartition("=")[2]
    assert "unknown key model.arch: only model=timm" in refused("model=resnet18", "+model.arch=resnet34")


def test_weights_that_an_architecture_does_not_have_are_refused(refused):
    without = next(name for name in timm.list_models("vit_*") if not timm.is_model_pretrained(name))
    message = refused("model=timm", f"model.arch={without}")
    assert f"timm has no weights for model.arch={without}" in message
    assert "model.weights=null model.freeze_bn=false" in message
    message = refused("model=timm", "model.arch=resnet18", "model.weights=imagenet")
    assert message.endswith("Write model.weights=pretrained.")
    message = refused("model=convnet_2ch", "model.weights=pretrained")
    assert "model.weights=pretrained: this model has no pretrained weights" in message


def test_pretrained_and_imagenet_are_the_same_run_of_the_models_that_have_imagenet_weights(plan):
    for model in ("resnet18", "resnet50", "resnet50_augmix", "efficientnet_lite0"):
        assert plan(f"model={model}", "model.weights=pretrained").run_id == plan(f"model={model}").run_id
        assert plan(f"model={model}").config["model"]["weights"] == "imagenet"


def test_sizes_that_a_network_cannot_have_are_refused_when_it_is_built(refused):
    with pytest.raises(UserError, match=r"image_size=32 is not a multiple .* 14 pixels. Set model.image_size=28\."):
        timm_model(None, arch="vit_small_patch14_dinov2", image_size=32)
    with pytest.raises(UserError, match=r"timm can't build model.arch=gcvit_xxtiny with .*img_size=3"):
        timm_model(None, arch="gcvit_xxtiny", image_size=3)
    assert "is not model.image_size=160" in refused("model=timm", "model.arch=test_vit", "model.backbone.image_size=32")


def test_a_label_names_its_network(refused, plan):
    chosen = ("model=timm", "model.arch=resnet34.a1_in1k")
    for label in ("timm/resnet18", "torchvision/resnet34", "resnet50", "resnet152", "vit_s16"):
        assert f"model.name={label}: that is the name of another model" in refused(*chosen, f"model.name={label}"), (
            label
        )
    for label in ("mine", "my/resnet18"):
        assert plan(*chosen, f"model.name={label}").config["model"]["name"] == label
    assert "vit_s16: that is the name of another model, with arch" in refused("model=vit_s16", "model.arch=test_vit")
    plan("model=torchvision", "model.arch=resnet152", "model.name=resnet152")  # one that is not a choice itself


def test_without_timm_the_command_that_installs_it_is_named(refused, monkeypatch):
    pretrained_cfg.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)  # Python then raises ImportError on import
    assert "pip install 'gsdg[backbones]'" in refused("model=vit_s16")


# ---- weights from a file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_a_file_with_timms_names_is_loaded_with_or_without_the_classifier(arch, tmp_path):
    torch.manual_seed(0)
    net, images = timm.create_model(arch, num_classes=1000), torch.randn(2, 3, 160, 160)
    whole, file = net.state_dict(), tmp_path / "net.pth"
    trunk = timm.create_model(arch, num_classes=0).state_dict().keys()
    expected = net.eval().forward_head(net.forward_features(images), pre_logits=True)
    for state in (whole, {name: tensor for name, tensor in whole.items() if name in trunk}):
        torch.save(state, file)
        loaded, _ = timm_model(str(file), arch=arch, image_size=160)
        assert torch.equal(loaded.eval()(images), expected)
    torch.save({name: tensor for name, tensor in whole.items() if name != next(iter(trunk))}, file)
    with pytest.raises(UserError, match=rf"does not fit the model:\s+1 missing: {re.escape(next(iter(trunk)))}"):
        timm_model(str(file), arch=arch, image_size=160)
