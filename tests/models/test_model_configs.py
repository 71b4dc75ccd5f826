from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from gsdg.models import Classifier
from gsdg.schema import build

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "model"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
class TestModelConfig:
    def test_its_keys_are_the_classifiers_arguments(self, file):
        yaml = OmegaConf.load(file)
        assert yaml.name == file.stem
        parameters = inspect.signature(Classifier).parameters
        assert set(yaml) - {"name", "_target_"} == set(parameters) - {"classes", "precision"}

    def test_it_says_what_it_is_on_top(self, file):
        assert file.read_text().startswith("# ")

    def test_it_builds_and_returns_logits(self, file):
        yaml = OmegaConf.to_container(OmegaConf.load(file))
        if yaml["name"] in ("efficientnet_lite0", "resnet50_augmix"):
            pytest.importorskip("timm", reason="pip install 'gsdg[backbones]'")
        model = build(yaml | {"weights": None}, classes=5)
        size = min(32, yaml["image_size"])  # a perceptron takes its own size only
        images = torch.randn(2, model.spec.channels, size, size)
        assert model(images).shape == (2, 5)
        assert model.featurize(images).shape == (2, model.features)
        assert model.spec == (yaml["image_size"], len(yaml["mean"]), tuple(yaml["mean"]), tuple(yaml["std"]))


def test_the_five_models_of_the_first_issue_are_there():
    names = {file.stem for file in FILES}
    assert names >= {"convnet", "resnet18", "resnet50", "efficientnet_lite0", "resnet50_augmix"}
