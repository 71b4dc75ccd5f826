from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from config_choices import NEEDED, UNAVAILABLE
from omegaconf import OmegaConf

from gsdg.config.schema import build
from gsdg.models import Classifier
from gsdg.models.backbone import with_declared_images
from gsdg.plan import resolve_config

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "model"
FILES = sorted(FOLDER.glob("*.yaml"))
LARGE = {"clip_b16", "dinov2_b14", "regnety_16gf", "vit_b16", "wide_resnet50_2"}  # more than 60 M parameters
SMALLEST = {"clip_rn50": 64, "dinov2_s14": 28, "dinov2_b14": 28}  # image sizes; 32 for others


def node(compose, name: str, *overrides: str) -> dict:
    """The node of a model, with the images that its backbone declares."""
    chosen = f"model={name}"
    if chosen in UNAVAILABLE:
        pytest.skip("timm is not installed: pip install 'gsdg[backbones]'")
    return with_declared_images(resolve_config(compose(chosen, *NEEDED.get(chosen, []), *overrides))["model"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_keys_of_a_config_are_the_classifiers_arguments_and_its_first_line_says_what_it_is(compose, file):
    model = node(compose, file.stem)
    assert model["name"] == {"timm": "timm/test_vit", "torchvision": "torchvision/resnet18"}.get(file.stem, file.stem)
    of_every_model = OmegaConf.load(FOLDER.parent / "what_trains.yaml").model  # removed where they keep their default
    arguments = set(inspect.signature(Classifier).parameters) - {"classes", "precision", *of_every_model}
    assert set(model) - {"name", "_target_"} == arguments
    assert file.read_text().startswith("# ")


@pytest.mark.parametrize(
    "name", [pytest.param(file.stem, marks=[pytest.mark.slow] * (file.stem in LARGE)) for file in FILES]
)
def test_every_config_builds_a_model_that_returns_logits(compose, name):
    declared = node(compose, name)
    size = SMALLEST.get(name, min(32, declared["image_size"]))
    small = node(compose, name, f"model.image_size={size}") if "image_size" in declared["backbone"] else declared
    model = build(small | {"weights": None}, classes=5).eval()
    images = torch.randn(2, model.spec.channels, size, size)
    assert model(images).shape == (2, 5)
    assert model.featurize(images).shape == (2, model.features)
    assert model.spec == (small["image_size"], len(small["mean"]), tuple(small["mean"]), tuple(small["std"]))


PRESETS = [file.stem for file in FILES if "\ndefaults:" in file.read_text()]


@pytest.mark.parametrize("name", PRESETS)
def test_the_header_of_a_preset_says_how_many_parameters_and_features_there_are(compose, name):
    words = " ".join((FOLDER / f"{name}.yaml").read_text().split("defaults:")[0].replace("\n#", "").split())
    with torch.device("meta"):  # shapes without numbers
        model = build(node(compose, name) | {"weights": None}, classes=5)
    parameters = sum(parameter.numel() for parameter in model.featurizer.parameters())
    assert f"{parameters / 1e6:.1f} M parameters, {model.features} features" in words
    assert "https://arxiv.org/abs/" in words
