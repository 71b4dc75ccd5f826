"""Every choice of conf/ as an override, and the other overrides that some choices need."""

from __future__ import annotations

from importlib.util import find_spec

from helpers import REPOSITORY

from gsdg.config.choices import choices, groups
from gsdg.plan import SUPPLIED

CONF = REPOSITORY / "conf"
CHOICES = [
    f"{group}={name}"
    for group in groups()
    if group.split("/")[0] in SUPPLIED
    for name in sorted(choices(group) - {"base"})  # what others of its folder are made of
]
LOGGERS = [f"logger={name}" for name in sorted(choices("logger"))]
# Choices that cannot be prepared, because timm, an extra, is not installed.
UNAVAILABLE = {
    f"{group}={path.stem}"
    for group in ("model", "optimizer")
    for path in (CONF / group).glob("*.yaml")
    if find_spec("timm") is None and "gsdg[backbones]" in path.read_text()
}
# Of these, the choices whose `_target_` is in the extra itself: not even their keys can be found.
NOT_IMPORTABLE = {choice for choice in UNAVAILABLE if choice.startswith("optimizer=")}
PRESETS = sorted(choices("experiment"))
NEEDED = {
    "dataset=image_folder": ["dataset.root=x"],
    "dataset=list": ["dataset.file=x/x.csv"],
    "dataset=iwildcam": ["dataset.file=x/x.csv"],
    "split=from_list": ["dataset=list", "dataset.file=x/x.csv"],
    "algorithm/partition=groups": ["algorithm.partition.patterns=['*.bias']"],
    "algorithm=pseudo_label": ["split.uda_fraction=0.5"],
    "model=timm": ["model.arch=test_vit"],
    "model=torchvision": ["model.arch=resnet18"],
} | {choice: ["algorithm=irm"] for choice in CHOICES if choice.startswith("algorithm/surgery=")}
