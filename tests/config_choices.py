"""Every choice that conf/ offers, as overrides, and what some cannot be composed without."""

from __future__ import annotations

from helpers import REPOSITORY

from gsdg.experiment import SUPPLIED

CONF = REPOSITORY / "conf"
CHOICES = [
    f"{path.parent.relative_to(CONF)}={path.stem}"
    for group in SUPPLIED
    for path in sorted((CONF / group).rglob("*.yaml"))
    if path.stem != "base"  # what others of its folder are made of
]
PRESETS = sorted(
    str(path.relative_to(CONF / "experiment").with_suffix("")) for path in (CONF / "experiment").rglob("*.yaml")
)
NEEDED = {
    "dataset=image_folder": ["dataset.root=x"],
    "algorithm/partition=groups": ["algorithm.partition.patterns=['*.bias']"],
} | {choice: ["algorithm=irm"] for choice in CHOICES if choice.startswith("algorithm/surgery=")}
