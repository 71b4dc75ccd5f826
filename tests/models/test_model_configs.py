from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from gsdg.config.schema import build
from gsdg.models import Classifier

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "model"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_the_keys_of_every_config_are_the_classifiers_arguments_and_its_first_line_says_what_it_is():
    assert {file.stem for file in FILES} >= {"convnet", "resnet18", "resnet50", "efficientnet_lite0", "resnet50_augmix"}
    of_every_model = OmegaConf.load(FILES[0].parents[1] / "what_trains.yaml").model
    arguments = set(inspect.signature(Classifier).parameters) - {"classes", "precision", *of_every_model}
    for file in FILES:
        yaml = OmegaConf.load(file)
        assert yaml.name == file.stem
        assert set(yaml) - {"name", "_target_"} == arguments, file
        assert file.read_text().startswith("# "), file


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_builds_a_model_that_returns_logits(file):
    yaml = OmegaConf.to_container(OmegaConf.load(file))
    if yaml["name"] in ("efficientnet_lite0", "resnet50_augmix"):
        pytest.importorskip("timm", reason="pip install 'gsdg[backbones]'")
    model = build(yaml | {"weights": None}, classes=5)
    size = min(32, yaml["image_size"])  # the mlp accepts one size only
    images = torch.randn(2, model.spec.channels, size, size)
    assert model(images).shape == (2, 5)
    assert model.featurize(images).shape == (2, model.features)
    assert model.spec == (yaml["image_size"], len(yaml["mean"]), tuple(yaml["mean"]), tuple(yaml["std"]))
