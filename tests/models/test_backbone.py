"""A user's own backbone: a function, a class or a module; whatever else it is or returns is named."""

from __future__ import annotations

import pytest
import torch
from algorithm_cases import refusal
from harness import observe
from torch import Tensor, nn

from gsdg.config.schema import build, check
from gsdg.models import Classifier
from gsdg.plan import prepare
from gsdg.utils.errors import UserError

SETTINGS = {"classes": 4, "head": "linear", "dropout": 0.0, "freeze_bn": False, "image_size": 4, "mean": [0.0] * 3}


class Net(nn.Module):
    """[B, 3, 4, 4] -> [B, width]."""

    def __init__(self, weights: str | None = None, *, width: int = 5) -> None:
        super().__init__()
        self.layer, self.num_features, self.got = nn.Linear(48, width), width, weights

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))


class Flat(Net):
    """[B, 3, 8, 8] -> [B, 5]; a file is loaded by its own code, as a class that is called with weights has to."""

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 5)
        if weights:
            self.load_state_dict(torch.load(weights))


def model(backbone, weights: str | None = None) -> Classifier:
    return Classifier(backbone=backbone, weights=weights, std=[1.0] * 3, **SETTINGS)


def node(target: str, **options) -> dict:
    return {"_target_": "gsdg.models.Classifier", "backbone": {"_target_": target, **options}, "weights": None,
            "std": [1.0] * 3, **{key: value for key, value in SETTINGS.items() if key != "classes"}}  # fmt: skip


def test_a_function_a_class_and_a_module_are_backbones(tmp_path):
    images, own = torch.randn(2, 3, 4, 4), Net()
    for backbone in (lambda weights: (Net(weights), 5), lambda weights: Net(weights), Net, own):
        assert model(backbone).features == 5
        assert model(backbone)(images).shape == (2, 4)
    assert model(Net, "word").featurizer.got == "word"  # its own code knows what that means
    torch.save(Net().state_dict(), tmp_path / "net.pth")
    loaded = model(own, str(tmp_path / "net.pth"))
    assert loaded.featurizer is own
    assert torch.equal(own.layer.weight, torch.load(tmp_path / "net.pth")["layer.weight"])
    with pytest.raises(UserError, match="no such file"):
        model(own, "elsewhere.pth")


def test_a_config_names_a_function_a_class_or_a_module(monkeypatch):
    monkeypatch.syspath_prepend("tests/models")
    target = f"{__name__}.Net"
    for options in ({"_partial_": True, "width": 6}, {"width": 6}):
        checked = check(node(target, **options), "model", {"classes": "", "precision": ""})
        assert build(checked, classes=4).features == 6
    with pytest.raises(UserError, match=r"model.backbone.weights cannot be set: it is passed by model"):
        check(node(target, _partial_=True, weights="a"), "model", {"classes": "", "precision": ""})
    # built without _partial_, `weights` is an argument like any other
    checked = check(node(target, weights="a"), "model", {"classes": "", "precision": ""})
    assert build(checked, classes=4).featurizer.got == "a"
    message = r"model.backbone.weights is missing: gsdg.models.resnet18 needs it. Or, .*: _partial_: true"
    with pytest.raises(UserError, match=message):
        check(node("gsdg.models.resnet18"), "model", {"classes": "", "precision": ""})


@pytest.mark.parametrize("partial", [{"_partial_": True}, {}])
def test_a_run_trains_a_module_of_the_users_own_from_random_weights_and_from_a_file(tmp_path, partial):
    backbone = {"model.backbone": {"_target_": f"{__name__}.Flat", **partial}, "trainer.steps": 1}
    first = observe(**backbone)
    torch.manual_seed(1)
    torch.save(Flat().state_dict(), tmp_path / "net.pth")
    second = observe(**backbone, **{"model.weights": str(tmp_path / "net.pth")})
    assert first.plan.run_id != second.plan.run_id
    assert second.plan.identity["model"]["weights"].startswith("sha256 ")  # its content, not its path
    assert torch.equal(
        second.weights[0]["model.featurizer.layer.weight"], torch.load(tmp_path / "net.pth")["layer.weight"]
    )


def test_whatever_else_a_backbone_is_or_returns_is_refused():
    wide = Net()
    wide.num_features = "wide"
    for backbone, found in (
        (lambda weights: None, "returned NoneType"),
        (lambda weights: (5, Net()), "returned a tuple of int, Net"),
        (lambda weights: (Net(), 5, 6), "returned a tuple of Net, int, int"),
        (lambda weights: nn.Linear(48, 5), "the module Linear has no num_features"),
        (lambda weights: (Net(), 5.0), "is 5.0; valid: an integer, 1 or more"),
        (lambda weights: (Net(), 0), "is 0; valid"),
        (wide, "num_features of the module Net is 'wide'"),
        ((Net(), 5), "found a tuple of Net, int; .* needs `_partial_: true`"),
    ):
        with pytest.raises(UserError, match=found):
            model(backbone)


def test_features_of_another_shape_are_refused_at_the_first_images():
    class Tokens(Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)[:, None].expand(-1, 7, -1)

    class Both(Net):
        def forward(self, images: Tensor):
            return super().forward(images), None

    for backbone, found in (
        (lambda weights: (Net(), 6), r"features \[B, 6\], .* found the shape \[2, 5\]"),
        (Tokens, r"features \[B, 5\], .* found the shape \[2, 7, 5\]. Average over positions or tokens"),
        (Both, "found tuple"),
    ):
        with pytest.raises(UserError, match=found):
            model(backbone)(torch.randn(2, 3, 4, 4))


def test_nulls_that_a_backbone_declares_nothing_for_are_refused(compose):
    photos = ("dataset=pacs", "split.target=photo", "model=resnet18")
    message = refusal(prepare, compose(*photos, "model.mean=null", "model.image_size=null"))
    assert message.startswith("model.image_size=null: this model's backbone does not declare")
    assert message.endswith("Set model.image_size, model.mean.")


def test_pretrained_weights_of_a_module_that_is_built_without_weights_are_refused(compose):
    config = compose("dataset=pacs", "split.target=photo", "model=resnet18", "model.name=mine")
    config.model.backbone = {"_target_": f"{__name__}.Net"}
    config.model.weights = "pretrained"
    assert "this model has no pretrained weights. Valid: null" in refusal(prepare, config)
