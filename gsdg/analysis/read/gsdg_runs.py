"""Reads a GSDG run folder: one `Run`, or two if weights were averaged. The folder's layout: gsdg/runs/folder.py."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from gsdg.analysis.read.labels import SEARCHED
from gsdg.analysis.read.run import (
    Evaluations,
    NotARun,
    Run,
    describe_draw,
    flatten,
    read_json_lines,
    repeated_steps,
    summarize_problems,
)
from gsdg.config.identity import NOT_SCIENTIFIC, edited_keys, hash_identity
from gsdg.metrics import ACCURACY, METRICS, Metric
from gsdg.runs.folder import STALE_AFTER
from gsdg.utils.json_files import read_json

# Keys in which the runs of one method may differ.
NOT_IN_METHOD = {*NOT_SCIENTIFIC, "split.target", "split.trial_seed", "seed", "search.hparams_seed", "soup.ingredients"}
AVERAGING = "trainer.averaging."  # keys that affect the averaged weights only, not the trained ones
RUN_ID = re.compile(r"[0-9a-f]{12}")


def read_run(folder: Path) -> list[Run]:
    """The run in `folder` and, if its weights were averaged, a second run for the averaged weights.

    The second one has the run id `<id>:swad` and the algorithm `erm+swad` (if the averaging is called swad).

    Raises:
        NotARun: config.json is missing, unreadable, or not the config of a run.
    """
    config = _read_config(folder)
    metadata = _metadata(config) | _status(folder / "status.json", config)
    evaluations, scores, problems = read_records(folder / "records.jsonl")
    problems += _identity_problems(folder, config)
    flat = flatten(config)
    searched = _searched_keys(config)
    drawn = {name: json.loads(flat.get(key, "null")) for name, key in searched.items()}
    averaging = {key: value for key, value in flat.items() if key.startswith(AVERAGING)}
    metadata |= {"drawn": describe_draw(drawn), "run_id": folder.name, "averaging": averaging}
    settings = {key: value for key, value in flat.items() if key not in NOT_IN_METHOD}
    settings |= dict.fromkeys(searched.values(), SEARCHED)
    run = Run(metadata, _without_averaging(flat), _without_averaging(settings), evaluations, problems, scores)
    if f"{AVERAGING}name" not in flat:
        return [run]
    name = json.loads(flat[f"{AVERAGING}name"])
    metadata = metadata | {"run_id": f"{folder.name}:{name}", "algorithm": f"{metadata['algorithm']}+{name}"}
    evaluations, scores, problems = read_records(folder / "averaged.jsonl")
    return [run, Run(metadata, flat, settings, evaluations, problems, scores)]


def _identity_problems(folder: Path, config: dict) -> list[str]:
    """A message if config.json or identity.json does not fit the run id, which is the folder's name."""
    identity = read_json(folder / "identity.json").get("config")
    if identity is None or not RUN_ID.fullmatch(folder.name):
        return []
    if hash_identity(identity) != folder.name:
        return ["its run id is not the hash of its identity.json, which was edited or written by another version"]
    changed = edited_keys(identity, config)
    return [f"its config.json was edited, it is not what was run: {', '.join(changed[:3])}"] if changed else []


def _without_averaging(flat: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in flat.items() if not key.startswith(AVERAGING)}


def read_records(path: Path) -> tuple[Evaluations, dict[str, Evaluations], list[str]]:
    """(accuracies in a records.jsonl, its other metrics by name, messages about what was left out).

    The last record of each step counts.
    """
    evaluations: Evaluations = {}
    scores: dict[str, Evaluations] = {}
    invalid: list[str] = []
    steps: list[int] = []

    def handle(record: dict) -> None:
        step = int(record["step"])
        evaluations[step] = _remove_invalid(record["accuracy"], ACCURACY, step, invalid)
        for name, values in record.get("scores", {}).items():
            if name in METRICS:
                scores.setdefault(name, {})[step] = _remove_invalid(values, METRICS[name], step, invalid)
        steps.append(step)

    problems = read_json_lines(path, handle)
    problems += summarize_problems(invalid, "left out")
    return evaluations, scores, problems + repeated_steps(len(steps) - len(set(steps)))


def read_environment(folder: str | Path) -> list[dict]:
    """The lines of environment.jsonl, one for each time the run was started or resumed; [] if there is no such file.

    DomainBed's run folders have none.
    """
    starts: list[dict] = []
    read_json_lines(Path(folder) / "environment.jsonl", lambda line: starts.append(dict(line)))
    return starts


def _remove_invalid(values: dict, metric: Metric, step: int, messages: list[str]) -> dict[str, dict[str, float]]:
    """Remove what cannot be a value of the metric from {domain: {part: value}}, adding a message for each."""
    expected = "a fraction" if metric.percent else "a number of 0 or more"
    for domain, parts in list(values.items()):
        invalid = [part for part, value in parts.items() if not metric.is_valid(value)]
        for part in invalid:
            messages.append(f"{metric.name} of {domain} {part} at step {step} is {parts.pop(part)}, not {expected}")
    return values


def _read_config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotARun(f"config.json cannot be read: {error}") from None


def _metadata(config: dict) -> dict:
    """The columns of the status table that a config determines."""
    try:
        targets = config["split"]["target"]
        targets = (targets,) if isinstance(targets, str) else tuple(str(target) for target in targets)
        return {
            "source": "gsdg",
            "dataset": str(config["dataset"]["name"]),
            "algorithm": str(config["algorithm"]["name"]),
            "model": str(config["model"]["name"]),
            "target": "+".join(targets),
            "n_targets": len(targets),
            "trial_seed": int(config["split"]["trial_seed"]),
            "seed": int(config["seed"]),
            "hparams_seed": int((config.get("search") or {}).get("hparams_seed", 0)),
            "steps": config["trainer"]["steps"],
            "domains": tuple(str(domain) for domain in config["dataset"].get("domains") or ()),
            "targets": targets,
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise NotARun(f"config.json is not a run's config: {type(error).__name__} {error}") from None


def _searched_keys(config: dict) -> dict[str, str]:
    """{name: dotted key} of the hyper-parameters that a search draws; {} without a search."""
    ranges = (config.get("search") or {}).get("ranges") or {}
    return {name: entry["key"] for name, entry in ranges.items() if isinstance(entry, dict) and "key" in entry}


def _status(path: Path, config: dict) -> dict:
    """state, step, steps and reason from status.json. A running process without recent heartbeat is "dead"."""
    steps = config["trainer"]["steps"]
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        silence = time.time() - recorded["heartbeat"]
        status: dict[str, Any] = {"state": str(recorded["state"]), "reason": str(recorded.get("reason") or "")}
        status |= {"step": recorded.get("step") or 0, "steps": recorded.get("steps") or steps}
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return {"state": "unknown", "reason": "no readable status.json", "step": 0, "steps": steps}
    if status["state"] == "running" and silence > STALE_AFTER:
        status |= {"state": "dead", "reason": f"no heartbeat for {silence:.0f} s"}
    return status
