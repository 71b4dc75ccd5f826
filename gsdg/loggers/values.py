"""The numbers of a line of records.jsonl, averaged.jsonl or diagnostics.jsonl, by the names that all loggers use:

    train/loss, train/grad_norm, ...    means since the last evaluation; train/lr with a scheduler
    accuracy/DOMAIN/PART                shares in [0, 1], and each further metric of trainer.metrics likewise
    held_out_accuracy                   the mean of the sources' `out` parts, by which a step is selected
    averaged/...                        the same of averaged weights, with n, the number of weights averaged
    conflict_rate/GRANULARITY, ...      diagnostics, means over the modules
    seconds/step, seconds/evaluation

The learning rate is a metric only with a scheduler; otherwise it is that of the config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from gsdg.runs.kept_weights import held_out_accuracy
from gsdg.utils.json_files import read_lines


def of_record(record: Mapping[str, Any], sources: Sequence[str]) -> dict[str, float]:
    """sources: names of the source domains."""
    values = {"train": record.get("metrics"), "seconds": record.get("seconds"), **_evaluated(record, sources)}
    return numbers(values)


def of_average(record: Mapping[str, Any], sources: Sequence[str]) -> dict[str, float]:
    return numbers({"averaged": {**_evaluated(record, sources), "n": record.get("n")}})


def _evaluated(record: Mapping[str, Any], sources: Sequence[str]) -> dict[str, Any]:
    accuracy = record["accuracy"]
    return {"accuracy": accuracy, **record.get("scores", {}), "held_out_accuracy": held_out_accuracy(accuracy, sources)}


def of_diagnosis(diagnosis: Mapping[str, Any]) -> dict[str, float]:
    """The means over the modules, without modules that have no such number; of other diagnostics all numbers."""
    if "levels" not in diagnosis:
        return numbers({name: value for name, value in diagnosis.items() if name != "step"})
    means = {}
    for granularity, modules in diagnosis["levels"].items():
        for place, statistic in enumerate(diagnosis["statistics"]):
            if values := [row[place] for row in modules.values() if isfinite(row[place])]:
                means[f"{statistic}/{granularity}"] = fmean(values)
    return means


def numbers(node: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """{path with slashes: number} of a tree; whatever is no number is left out."""
    found: dict[str, float] = {}
    for name, value in node.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = value
    return found


def all_values(folder: Path, sources: Sequence[str]) -> list[tuple[int, dict[str, float]]]:
    """(step, numbers) of every line in a run's folder, in the order in which a run writes them."""
    lines = [(line["step"], of_diagnosis(line)) for line in read_lines(folder / "diagnostics.jsonl")]
    lines += [(line["step"], of_record(line, sources)) for line in read_lines(folder / "records.jsonl")]
    lines += [(line["step"], of_average(line, sources)) for line in read_lines(folder / "averaged.jsonl")]
    return sorted(lines, key=lambda line: line[0])
