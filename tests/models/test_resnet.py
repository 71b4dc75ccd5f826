from __future__ import annotations

from functools import partial

import pytest
import torch
from torchvision import models

from gsdg import models as ours
from gsdg.errors import UserError

SETTINGS = {
    "classes": 7,
    "freeze_bn": True,
    "dropout": 0.0,
    "head": "linear",
    "image_size": 32,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
resnet18 = partial(ours.Classifier, backbone=ours.resnet18)
resnet50 = partial(ours.Classifier, backbone=ours.resnet50)
FILE_OF_RESNET18 = "resnet18-f37072fd.pth"


@pytest.fixture(scope="module")
def pretend() -> models.ResNet:
    """Stands for a pretrained network: random, with running statistics that are not the initial ones."""
    net = models.resnet18()
    net.train()(torch.randn(4, 3, 32, 32))
    return net.eval()


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """torch.hub's empty cache on a machine that reaches nobody (its proxy is a closed port); returns its folder."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def features_before_fc(net: models.ResNet, images: torch.Tensor) -> torch.Tensor:
    net.fc, fc = torch.nn.Identity(), net.fc
    try:
        return net(images)
    finally:
        net.fc = fc


@pytest.mark.parametrize("drop", [(), ("fc.",), ("num_batches_tracked",)], ids=["whole", "no fc", "before torch 0.4.1"])
def test_a_weights_file_gives_the_features_of_the_network_that_was_saved(pretend, tmp_path, drop):
    state = {key: value for key, value in pretend.state_dict().items() if not any(word in key for word in drop)}
    torch.save(state, tmp_path / "net.pth")
    model = resnet18(weights=str(tmp_path / "net.pth"), **SETTINGS).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.featurize(images), features_before_fc(pretend, images))
    assert model(images).shape == (2, 7)


def test_imagenet_reads_the_file_that_lies_in_the_cache(pretend, offline_cache):
    offline_cache.mkdir(parents=True)
    torch.save(pretend.state_dict(), offline_cache / FILE_OF_RESNET18)
    model = resnet18(weights="imagenet", **SETTINGS)
    assert torch.equal(model.featurizer.layer4[1].bn2.running_var, pretend.layer4[1].bn2.running_var)


@pytest.mark.parametrize(
    ("factory", "name"), [(resnet18, FILE_OF_RESNET18), (resnet50, "resnet50-0676ba61.pth")], ids=["18", "50"]
)
def test_without_internet_the_message_names_the_file_and_the_ways_out(factory, name, offline_cache):
    with pytest.raises(UserError) as caught:
        factory(weights="imagenet", **SETTINGS)
    message = str(caught.value)
    assert str(offline_cache / name) in message
    assert f"https://download.pytorch.org/models/{name}" in message
    assert "model.weights=<file>" in message
    assert "model.weights=null model.freeze_bn=false" in message
    assert not (offline_cache / name).exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.pth: no such file. Valid: imagenet .* null"):
        resnet18(weights=str(tmp_path / "nowhere.pth"), **SETTINGS)


@pytest.mark.parametrize("keep", [0, 100, 200_000], ids=["empty", "a few bytes", "truncated"])
def test_an_unreadable_file_is_named_with_its_size(pretend, tmp_path, keep):
    path = tmp_path / "net.pth"
    torch.save(pretend.state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"net.pth \({keep} bytes\) can't be read"):
        resnet18(weights=str(path), **SETTINGS)


def test_a_file_that_is_no_state_dict_says_what_it_holds(pretend, tmp_path):
    torch.save({"epoch": 3, "state_dict": pretend.state_dict()}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="checkpoint.pth should hold a state dict .* found a dict of epoch, state_dict"):
        resnet18(weights=str(tmp_path / "checkpoint.pth"), **SETTINGS)


def test_a_file_that_runs_code_is_refused(tmp_path):
    torch.save(models.resnet18, tmp_path / "code.pth")
    with pytest.raises(UserError, match="code.pth .* can't be read"):
        resnet18(weights=str(tmp_path / "code.pth"), **SETTINGS)


def test_the_weights_of_another_network_are_refused_with_the_first_differences(pretend, tmp_path):
    state = pretend.state_dict()
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    state["layer9.weight"] = state.pop("bn1.weight")
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError) as caught:
        resnet18(weights=str(tmp_path / "other.pth"), **SETTINGS)
    message = str(caught.value)
    assert "other.pth does not fit" in message
    assert "1 missing: bn1.weight" in message
    assert "1 unexpected: layer9.weight" in message
    assert "1 of another shape: conv1.weight (64, 1, 7, 7) instead of (64, 3, 7, 7)" in message
