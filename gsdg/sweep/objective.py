"""The objective of a search: by which number its runs are judged.

training_domain: the best mean held-out accuracy of the source domains. oracle: the target's held-out accuracy at the
last step, which sees the target's labels. Both in [0, 1], higher is better.
"""

from __future__ import annotations

import math
from pathlib import Path

from gsdg.runs.folder import RunFolder
from gsdg.runs.kept_weights import held_out_accuracy
from gsdg.utils.json_files import read_json

OBJECTIVES = ("training_domain", "oracle")


def selection_value(run: Path, objective: str) -> float | None:
    """The value by which the objective judges the run in this folder; None if it is not done or has no such record."""
    return value_until(run, objective) if RunFolder(run).status.get("state") == "done" else None


def value_until(run: Path, objective: str, step: float = math.inf) -> float | None:
    """The value by which the run would be judged if it had ended after `step`; None if no image is held out."""
    accuracies = [record["accuracy"] for record in RunFolder(run).records() if record["step"] <= step]
    if not accuracies:
        return None
    target = read_json(run / "config.json")["split"]["target"]
    targets = [target] if isinstance(target, str) else target
    if objective == "oracle":
        return held_out_accuracy(accuracies[-1], targets)
    sources = [name for name in accuracies[0] if name not in targets]
    means = [held_out_accuracy(accuracy, sources) for accuracy in accuracies]
    return max((mean for mean in means if mean is not None), default=None)
