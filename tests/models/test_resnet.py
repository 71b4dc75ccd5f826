from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torchvision import models

from gsdg import models as ours
from gsdg.models.weights import hub
from gsdg.utils.errors import UserError

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
    """A stand-in for a pretrained network: random, with running statistics that differ from the initial ones."""
    net = models.resnet18()
    net.train()(torch.randn(4, 3, 32, 32))
    return net.eval()


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """The folder of torch.hub's empty cache, on a machine without internet (its proxy is a closed port)."""
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


def write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def check_refused(weights: object, *messages: str, factory=resnet18) -> None:
    """messages: patterns."""
    with pytest.raises(UserError) as caught:
        factory(weights=str(weights), **SETTINGS)
    for message in messages:
        assert re.search(message, str(caught.value)), str(caught.value)


def test_a_weights_file_gives_the_features_of_the_network_that_was_saved(pretend, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    for drop in ((), ("fc.",), ("num_batches_tracked",)):  # whole, without fc, as before torch 0.4.1
        state = {key: value for key, value in pretend.state_dict().items() if not any(word in key for word in drop)}
        model = resnet18(weights=str(write(tmp_path / "net.pth", state)), **SETTINGS).eval()
        assert torch.equal(model.featurize(images), features_before_fc(pretend, images)), drop
        assert model(images).shape == (2, 7)


def test_imagenet_reads_the_file_that_lies_in_the_cache_unless_it_is_not_what_its_name_says(
    pretend, offline_cache, monkeypatch
):
    offline_cache.mkdir(parents=True)
    path = write(offline_cache / FILE_OF_RESNET18, pretend.state_dict())
    check_refused("imagenet", rf"not with f37072fd.*: rm {path}$")
    # The real file cannot be downloaded here; the name of this file has no hash to compare.
    path.rename(offline_cache / "resnet18.pth")
    monkeypatch.setattr(ours.resnet18, "imagenet", hub("http://127.0.0.1:9/resnet18.pth"))
    model = resnet18(weights="imagenet", **SETTINGS)
    assert torch.equal(model.featurizer.layer4[1].bn2.running_var, pretend.layer4[1].bn2.running_var)


def test_without_internet_the_message_names_the_file_and_the_ways_out(offline_cache):
    for factory, name in ((resnet18, FILE_OF_RESNET18), (resnet50, "resnet50-0676ba61.pth")):
        check_refused(
            *("imagenet", re.escape(str(offline_cache / name)), f"https://download.pytorch.org/models/{name}"),
            *("model.weights=<file>", "model.weights=null model.freeze_bn=false"),
            factory=factory,
        )
        assert not (offline_cache / name).exists()


def test_a_file_that_is_missing_unreadable_or_no_state_dict_is_named_with_what_it_is(pretend, tmp_path):
    check_refused(tmp_path / "nowhere.pth", r"nowhere.pth: no such file. Valid: pretrained or imagenet .* null")
    content = write(tmp_path / "net.pth", pretend.state_dict()).read_bytes()
    for size in (0, 100, 200_000):
        (tmp_path / "net.pth").write_bytes(content[:size])
        check_refused(tmp_path / "net.pth", rf"net.pth \({size} bytes\) can't be read")
    check_refused(write(tmp_path / "code.pth", models.resnet18), "code.pth holds Python objects")  # it would run code
    path = write(tmp_path / "checkpoint.pth", {"epoch": 3, "optimizer": {"lr": 0.1}})
    check_refused(path, "checkpoint.pth should hold a state dict .* found a dict of epoch, optimizer")


def test_the_weights_of_another_network_are_refused_with_the_first_differences(pretend, tmp_path):
    state = pretend.state_dict()
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    state["layer9.weight"] = state.pop("bn1.weight")
    check_refused(
        *(write(tmp_path / "other.pth", state), "other.pth does not fit", "1 missing: bn1.weight"),
        "1 unexpected: layer9.weight",
        r"1 of another shape: conv1.weight \(64, 1, 7, 7\) instead of \(64, 3, 7, 7\)",
    )
