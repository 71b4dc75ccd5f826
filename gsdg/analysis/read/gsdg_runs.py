"""A run folder of GSDG -> a `Run`, or two where weights were averaged. The layout is described in gsdg/runs.py."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from analysis.labels import SEARCHED
from analysis.run import Evaluations, NotARun, Run, first_of, flat, is_fraction, read_json_lines, repeated, said_values
from gsdg.identity import NOT_SCIENTIFIC, edited, hashed
from gsdg.runs import STALE_AFTER, read_json

NO_METHOD = {*NOT_SCIENTIFIC, "split.target", "split.trial_seed", "seed", "search.hparams_seed"}
AVERAGING = "trainer.averaging."  # what is set there does not change how the weights themselves are trained
RUN_ID = re.compile(r"[0-9a-f]{12}")


def read_run(folder: Path) -> list[Run]:
    """The run and, with trainer/averaging, that of its averaged weights: `<id>:swad`, a method of its own, `erm+swad`.

    NotARun if its config.json is absent, unreadable or something else.
    """
    config = _read_config(folder)
    facts = _facts(config) | _status(folder / "status.json", config)
    evaluations, problems = read_records(folder / "records.jsonl")
    problems += _other_than_its_name(folder, config)
    whole = flat(config)
    drawn = _drawn(config)
    facts["drawn"] = said_values({name: json.loads(whole.get(key, "null")) for name, key in drawn.items()})
    facts |= {"run_id": folder.name, "averaging": {key: whole[key] for key in whole if key.startswith(AVERAGING)}}
    method = {key: value for key, value in whole.items() if key not in NO_METHOD}
    method |= dict.fromkeys(drawn.values(), SEARCHED)
    run = Run(facts, _plain(whole), _plain(method), evaluations, problems)
    if f"{AVERAGING}name" not in whole:
        return [run]
    name = json.loads(whole[f"{AVERAGING}name"])
    facts = facts | {"run_id": f"{folder.name}:{name}", "algorithm": f"{facts['algorithm']}+{name}"}
    return [run, Run(facts, whole, method, *read_records(folder / "averaged.jsonl"))]


def _other_than_its_name(folder: Path, config: dict) -> list[str]:
    """A problem where a run's config is not the one that its folder is named after."""
    identity = read_json(folder / "identity.json").get("config")
    if identity is None or not RUN_ID.fullmatch(folder.name):
        return []
    if hashed(identity) != folder.name:
        return ["its name is not its identity's hash: identity.json was edited, or is another version's"]
    changed = edited(identity, config)
    return [f"its config.json was edited, it is not what was run: {', '.join(changed[:3])}"] if changed else []


def _plain(flat: dict[str, str]) -> dict[str, str]:
    """A config without what is about averaged weights."""
    return {key: value for key, value in flat.items() if not key.startswith(AVERAGING)}


def read_records(path: Path) -> tuple[Evaluations, list[str]]:
    """What records.jsonl holds and what of it was left out; of several lines for one step the last counts."""
    found: Evaluations = {}
    wrong: list[str] = []
    steps: list[int] = []

    def take(record: dict) -> None:
        step = int(record["step"])
        found[step] = _fractions(record["accuracy"], step, wrong)
        steps.append(step)

    problems = read_json_lines(path, take)
    return found, [*problems, *first_of(wrong, "left out"), *repeated(len(steps) - len(set(steps)))]


def read_environment(folder: str | Path) -> list[dict]:
    """The starts that a run has noted in environment.jsonl; [] without it, as in the folders of DomainBed's runs."""
    found: list[dict] = []
    read_json_lines(Path(folder) / "environment.jsonl", lambda line: found.append(dict(line)))
    return found


def _fractions(accuracy: dict, step: int, wrong: list[str]) -> dict[str, dict[str, float]]:
    """The accuracies that are fractions; `wrong` is told of the others."""
    for domain, parts in list(accuracy.items()):
        bad = [part for part, value in parts.items() if not is_fraction(value)]
        for part in bad:
            wrong.append(f"accuracy of {domain} {part} at step {step} is {parts.pop(part)}, not a fraction")
    return accuracy


def _read_config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotARun(f"config.json cannot be read: {error}") from None


def _facts(config: dict) -> dict:
    """What the tables need to know of a run."""
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


def _drawn(config: dict) -> dict[str, str]:
    """{name: dotted key} of what a hyper-parameter search draws; {} without one."""
    ranges = (config.get("search") or {}).get("ranges") or {}
    return {name: entry["key"] for name, entry in ranges.items() if isinstance(entry, dict) and "key" in entry}


def _status(path: Path, config: dict) -> dict:
    """state, step, steps and reason as they are on disk, but for a process that has stopped beating: dead."""
    steps = config["trainer"]["steps"]
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
        silence = time.time() - status["heartbeat"]
        found = {"state": str(status["state"]), "reason": str(status.get("reason") or "")}
        found |= {"step": status.get("step") or 0, "steps": status.get("steps") or steps}
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return {"state": "unknown", "reason": "no readable status.json", "step": 0, "steps": steps}
    if found["state"] == "running" and silence > STALE_AFTER:
        found |= {"state": "dead", "reason": f"no heartbeat for {silence:.0f} s"}
    return found
