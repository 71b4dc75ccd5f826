"""Every choice of conf/ as an override, and the other overrides that some choices need."""

from __future__ import annotations

from helpers import REPOSITORY

from gsdg.config.choices import choices, groups
from gsdg.experiment import SUPPLIED

CONF = REPOSITORY / "conf"
CHOICES = [
    f"{group}={name}"
    for group in groups()
    if group.split("/")[0] in SUPPLIED
    for name in sorted(choices(group) - {"base"})  # what others of its folder are made of
]
PRESETS = sorted(choices("experiment"))
NEEDED = {
    "dataset=image_folder": ["dataset.root=x"],
    "algorithm/partition=groups": ["algorithm.partition.patterns=['*.bias']"],
} | {choice: ["algorithm=irm"] for choice in CHOICES if choice.startswith("algorithm/surgery=")}
