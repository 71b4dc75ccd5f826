"""Any classification network of torchvision: its images, features and weights are torchvision's own."""

from __future__ import annotations

import pytest
import torch
from algorithm_cases import refusal
from torchvision import models

from gsdg.models import torchvision_model
from gsdg.models.torchvision_model import torchvision_images, torchvision_weights
from gsdg.plan import prepare
from gsdg.utils.errors import UserError

PHOTOS = ("dataset=pacs", "split.target=photo")


def test_the_classifier_is_removed_and_what_it_got_are_the_features(tmp_path):
    """Networks whose classifier is `fc`, one of several layers, and within a module."""
    for arch, expected in {"resnet34": 512, "mobilenet_v3_small": 1024, "densenet121": 1024, "swin_t": 768}.items():
        torch.manual_seed(0)
        whole, images, given = models.get_model(arch).eval(), torch.randn(2, 3, 64, 64), []
        classifier = [module for module in whole.modules() if isinstance(module, torch.nn.Linear)][-1]
        classifier.register_forward_pre_hook(lambda module, inputs, given=given: given.append(inputs[0]))
        whole(images)
        torch.save(whole.state_dict(), tmp_path / "net.pth")
        net, features = torchvision_model(str(tmp_path / "net.pth"), arch=arch, image_size=64)
        assert features == expected == classifier.in_features
        assert torch.equal(net.eval()(images), given[0]), arch
        torch.save(net.state_dict(), tmp_path / "net.pth")  # without the classifier
        again = torchvision_model(str(tmp_path / "net.pth"), arch=arch, image_size=64)[0]
        assert torch.equal(again.eval()(images), given[0]), arch


def test_pretrained_means_the_first_weights_or_the_default_where_there_are_no_such(compose):
    assert torchvision_weights("resnet34").file().name == "resnet34-b627a593.pth"
    assert torchvision_weights("resnet50").file().name == "resnet50-0676ba61.pth"  # not V2, the default
    default = models.RegNet_Y_128GF_Weights.DEFAULT
    assert torchvision_weights("regnet_y_128gf").file().name in default.url
    assert torchvision_images("regnet_y_128gf").size == 384
    model = prepare(compose(*PHOTOS, "model=torchvision", "model.arch=efficientnet_b3")).config["model"]
    assert (model["image_size"], model["mean"], model["std"]) == (300, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert model["name"] == "torchvision/efficientnet_b3"


def test_pretrained_loads_the_file_in_torchs_cache_and_torchvision_renames_its_tensors(tmp_path, monkeypatch):
    """DenseNet's file has names of 2017, which torchvision renames."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = torchvision_weights("densenet121").file()
    torch.manual_seed(0)
    whole = models.densenet121()
    today = {name: tensor for name, tensor in whole.state_dict().items() if not name.endswith("num_batches_tracked")}
    state = {name.replace(".norm1.", ".norm.1."): tensor for name, tensor in today.items()}
    assert state.keys() != today.keys()
    file.parent.mkdir(parents=True)
    torch.save(state, file)
    monkeypatch.setattr("gsdg.models.weights.check_hash", lambda file: None)  # these are not the real weights
    net, _ = torchvision_model("pretrained", arch="densenet121", image_size=64)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in net.state_dict().items())
    file.unlink()
    monkeypatch.setenv("GSDG_OFFLINE", "prepare")
    with pytest.raises(UserError, match="compute node downloads nothing; on a login node: prepare"):
        torchvision_model("pretrained", arch="densenet121", image_size=64)


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_networks_without_one_linear_classifier_and_unknown_ones_are_refused_by_name(compose):
    for arch, layers in {"squeezenet1_1": 0, "googlenet": 3}.items():
        with pytest.raises(UserError, match=rf"model.arch={arch}: .* has {layers} linear layers"):
            torchvision_model(None, arch=arch, image_size=224)
    with pytest.raises(UserError, match="model.arch=vit_b_16 .* 224 pixels only, found model.image_size=96"):
        torchvision_model(None, arch="vit_b_16", image_size=96)
    message = refusal(prepare, compose(*PHOTOS, "model=torchvision", "model.arch=resnet35"))
    assert "torchvision has no such network. Near names: resnet" in message
    for other in ("fasterrcnn_resnet50_fpn", "r3d_18"):  # it would download weights; it takes videos
        assert "no such network" in refusal(prepare, compose(*PHOTOS, "model=torchvision", f"model.arch={other}"))
