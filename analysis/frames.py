"""Run folders -> tidy frames. The layout of a run folder is described in gsdg/runs.py.

Nothing on disk is fatal here but a missing `runs_dir`: half-written, foreign and broken files are left out and
reported in `Runs.problems`, because a table is wanted most while a sweep is running or after one has gone wrong.

A method is a config, not a name: runs are put together only if their scientific configs are equal apart from the
target, the trial seed and the seed. DomainBed puts together whatever has the same algorithm name.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from gsdg.errors import UserError
from gsdg.runs import STALE_AFTER, read_lines, scientific

RUN = ["run_id", "dataset", "algorithm", "model", "target", "n_targets", "trial_seed", "seed"]
STATUS = [*RUN, "state", "step", "steps", "reason", "domains"]
RECORDS = [*RUN, "step", "domain", "part", "accuracy"]


@dataclass(frozen=True)
class Runs:
    """What is on disk.

    `status`: a row a run (columns STATUS). state is running, done, failed, stopped (by a signal: it saved itself), dead
    (running, but without a heartbeat) or unknown; reason is "" where none is noted; domains is the tuple of the
    dataset's domains in order, () where its config does not name them.
    `records`: a row per run, step, domain and part (columns RECORDS); accuracy is a fraction.
    `problems`: (folder, what was left out and why).
    A run with several targets has them joined by "+" in `target`; names may hold a "+": ask `n_targets`.
    """

    records: pd.DataFrame
    status: pd.DataFrame
    problems: tuple[tuple[str, str], ...]

    def finished(self) -> pd.DataFrame:
        """The records of the runs that are done: what selection looks at."""
        done = self.status.loc[self.status["state"] == "done", "run_id"]
        return self.records[self.records["run_id"].isin(done)]


def read_runs(runs_dir: str | Path, run_ids: Iterable[str] | None = None) -> Runs:
    """Read every run under `runs_dir`, or only `run_ids`. UserError if there is no such folder."""
    root = Path(runs_dir)
    if not root.is_dir():
        raise UserError(f"no folder of runs at {root}.\nGive the runs_dir of a training, for example: runs")
    problems: list[tuple[str, str]] = []
    rows, configs, evaluations = [], [], []
    names = [path.name for path in root.iterdir() if path.is_dir()] if run_ids is None else set(run_ids)
    for folder in (root / name for name in sorted(names) if not name.startswith(".")):
        try:
            config = _read_config(folder)
            row = {"run_id": folder.name, **_facts(config), **_status(folder / "status.json", config)}
            configs.append(_method(config))
        except _NotARun as reason:
            problems.append((folder.name, str(reason)))
            continue
        rows.append(row)
        evaluations.append(_evaluations(folder, problems))
    _label(rows, configs)
    status = pd.DataFrame(rows, columns=STATUS)
    records = _records(status, evaluations)
    copies = _copies(status, problems)
    status, records = status[~status["run_id"].isin(copies)], records[~records["run_id"].isin(copies)]
    return Runs(records.reset_index(drop=True), status.reset_index(drop=True), tuple(problems))


def read_diagnostics(folder: str | Path) -> pd.DataFrame:
    """diagnostics.jsonl of one run: a row per step, granularity (`level`) and module, a column per statistic.

    `frame[frame.level == "chunk"].pivot(index="module", columns="step", values="conflict_rate")` is a heat map. Empty
    where the run wrote none (algorithm.diagnostics=false); a truncated last line is left out.
    """
    rows = [
        {"step": line["step"], "level": level, "module": module, **dict(zip(line["statistics"], values, strict=True))}
        for line in read_lines(Path(folder) / "diagnostics.jsonl")
        for level, modules in line["levels"].items()
        for module, values in modules.items()
    ]
    return pd.DataFrame(rows, columns=None if rows else ["step", "level", "module"])


class _NotARun(Exception):
    """Why a folder is left out."""


def _read_config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise _NotARun("no such run" if not folder.exists() else "no config.json: not a run") from None
    except (OSError, ValueError) as error:
        raise _NotARun(f"config.json cannot be read: {error}") from None


def _facts(config: dict) -> dict:
    """What the tables need to know of a run."""
    try:
        targets = config["split"]["target"]
        targets = [targets] if isinstance(targets, str) else [str(target) for target in targets]
        return {
            "dataset": str(config["dataset"]["name"]),
            "algorithm": str(config["algorithm"]["name"]),
            "model": str(config["model"]["name"]),
            "target": "+".join(targets),
            "n_targets": len(targets),
            "trial_seed": int(config["split"]["trial_seed"]),
            "seed": int(config["seed"]),
            "steps": config["trainer"]["steps"],
            "domains": tuple(str(domain) for domain in config["dataset"].get("domains") or ()),
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _NotARun(f"config.json is not a run's config: {type(error).__name__} {error}") from None


def _method(config: dict) -> dict[str, str]:
    """The flat scientific config that two runs of one method share: {dotted key: value as JSON}."""
    flat = {}
    waiting = list(scientific(config).items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict) and value:
            waiting += [(f"{key}.{inner}", item) for inner, item in value.items()]
        elif key not in ("split.target", "split.trial_seed", "seed"):
            flat[key] = json.dumps(value)
    return flat


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


def _evaluations(folder: Path, problems: list[tuple[str, str]]) -> dict[int, dict]:
    """{step: {domain: {part: accuracy}}}; of several lines for one step the last counts."""
    try:
        lines = (folder / "records.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return {}
    found: dict[int, dict] = {}
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                record = json.loads(line)
                found[int(record["step"])] = _checked(record["accuracy"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            half = number == len(lines)  # a whole line ends in a newline
            what = "a truncated last record is left out" if half else f"unreadable record in line {number} ({error})"
            problems.append((folder.name, what))
    return found


def _checked(accuracy: dict) -> dict:
    for domain, parts in accuracy.items():
        for part, value in parts.items():
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise ValueError(f"accuracy of {domain} {part} is {value}, not a fraction")
    return accuracy


def _label(rows: list[dict], configs: list[dict[str, str]]) -> None:
    """Where an algorithm has several configs in a dataset, append to its name what differs."""
    groups = defaultdict(list)
    for row, config in zip(rows, configs, strict=True):
        groups[row["dataset"], row["algorithm"]].append((row, config))
    for members in groups.values():
        configs = [config for _, config in members]
        keys = sorted(_differing(configs), key=lambda key: key.removesuffix(".name"))
        for row, config in members if keys else []:
            shown = [key for key in keys if _tells(key, config, configs)]
            row["algorithm"] += f" ({', '.join(f'{_short(key)}={_show(config.get(key))}' for key in shown)})"


def _tells(key: str, config: dict[str, str], configs: list[dict[str, str]]) -> bool:
    """Whether `key` says more of a node than its `name` does: it differs between the nodes of that name too."""
    name = f"{key.rpartition('.')[0]}.name"
    peers = [other for other in configs if other.get(name) == config.get(name)]
    return key == name or len({other.get(key) for other in peers}) > 1


def _short(key: str) -> str:
    """`algorithm.partition.name` -> `partition`: what the override is called, but for the group's own prefix."""
    return key.removeprefix("algorithm.").removesuffix(".name")


def _differing(configs: list[dict[str, str]]) -> list[str]:
    """The keys whose values differ, without those `_target_`s that the `name` beside them already tells."""
    every = sorted({key for config in configs for key in config})
    keys = [key for key in every if len({config.get(key) for config in configs}) > 1]
    fewer = [key for key in keys if not (key.endswith("._target_") and key[: -len("_target_")] + "name" in keys)]
    methods = [len({tuple(config.get(key) for key in some) for config in configs}) for some in (fewer, keys)]
    return fewer if methods[0] == methods[1] else keys


def _show(value: str | None) -> str:
    """JSON as a person writes it: a string loses its quotes unless it would read as something else."""
    if value is None or not value.startswith('"'):
        return value or "unset"  # this config lacks the key
    try:
        json.loads(json.loads(value))
        return value
    except ValueError:
        return json.loads(value)


def _records(status: pd.DataFrame, evaluations: list[dict[int, dict]]) -> pd.DataFrame:
    """Plain lists first, one frame at the end: a frame a run would take most of the time."""
    flat = [
        (run, step, domain, part, value)
        for run, steps in enumerate(evaluations)
        for step, accuracy in sorted(steps.items())
        for domain, parts in accuracy.items()
        for part, value in parts.items()
    ]
    records = pd.DataFrame(flat, columns=["run", *RECORDS[-4:]]).astype({"run": int, "step": int, "accuracy": float})
    of_run = status[RUN].iloc[records.pop("run").to_numpy()].reset_index(drop=True)
    return pd.concat([of_run, records], axis=1)


def _copies(status: pd.DataFrame, problems: list[tuple[str, str]]) -> set[str]:
    """Runs that repeat another (a folder copied by hand): counted twice they would make a standard error too small."""
    key = ["dataset", "algorithm", "target", "trial_seed", "seed"]
    ordered = status.sort_values("state", key=lambda state: state != "done", kind="stable")
    copies = set(ordered.loc[ordered.duplicated(key), "run_id"])
    problems += [(run_id, "same config as another run: counted once") for run_id in sorted(copies)]
    return copies
