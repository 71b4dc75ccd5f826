"""Estimates what runs will cost, from measured runs: records note the seconds per step and per evaluation.

A run is compared with measured runs of the same method first, and then with less and less similar runs (RULES). The
cost of a run without any similar measured run stays unknown. Records do not contain the time for reading data and
starting up, so the estimate does not either. Imports no torch.
"""

from __future__ import annotations

import heapq
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gsdg.config.identity import scientific
from gsdg.runs.folder import RunFolder
from gsdg.utils.errors import listing, plural
from gsdg.utils.json_files import read_json, read_lines

ENOUGH = 12  # measured runs of one kind: more runs do not improve the median
READER_THREADS = 16


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of some runs.

    Args:
        seconds: seconds of each run, in order; None where no similar run was measured.
        rules: {name of a rule: number of runs whose cost was found by this rule}.
        measured: ids of the measured runs that were used.
        devices: the devices that these ran on.
    """

    seconds: list[float | None]
    rules: dict[str, int]
    measured: list[str]
    devices: list[str]

    @property
    def known(self) -> list[float]:
        """Seconds of the runs whose cost is known, in order."""
        return [value for value in self.seconds if value is not None]

    @property
    def total(self) -> float:
        """Seconds of all known runs together."""
        return sum(self.known)

    def wall(self, at_once: int) -> float:
        """Seconds until the last known run ends, if `at_once` runs are executed at a time, in order."""
        known = self.known
        ends = [0.0] * max(1, min(at_once, len(known)))  # a heap: ends[0] is the slot that is free first
        for seconds in known:
            heapq.heapreplace(ends, ends[0] + seconds)
        return max(ends)

    def basis(self) -> str:
        """`from 12 measured runs (the same method: 177 runs; on NVIDIA H100)`, and how many costs are unknown."""
        unknown = len(self.seconds) - len(self.known)
        parts = [f"from {plural(len(self.measured), 'measured run')} ("] if self.known else []
        if self.known:
            parts += ["; ".join(f"{rule}: {plural(count, 'run')}" for rule, count in self.rules.items())]
            parts += [f"; on {listing(self.devices)})" if self.devices else ")"]
        if unknown:
            parts += [", " if self.known else "", f"no measured run like these: {plural(unknown, 'run')}"]
        return "".join(parts)


def estimate(
    configs: Sequence[dict],
    runs_dir: Path,
    done: Sequence[int] | None = None,
    candidates: Iterable[tuple[Path, dict]] | None = None,
) -> Estimate:
    """The cost of runs with these configs.

    Args:
        configs: the configs of the runs.
        runs_dir: every run in this folder that recorded an evaluation after its first step may be used as a measure.
        done: the number of steps that each run has already done. Default: 0.
        candidates: (folder, config) of the runs that may be used instead of those in `runs_dir`.
    """
    measured_runs = MeasuredRuns(on_disk(runs_dir) if candidates is None else candidates)
    seconds, rules, used = [], Counter(), {}
    for config, steps_done in zip(configs, done or [0] * len(configs), strict=True):
        rule, cost = measured_runs.cost(config)
        seconds.append(cost and cost.of(config["trainer"], steps_done))
        if cost:
            rules[rule] += 1
            used.update(cost.runs)
    return Estimate(seconds, dict(rules), sorted(used), sorted({device for device in used.values() if device}))


# ---- which runs are similar -----------------------------------------------------------------------------------------


def same_method(config: dict) -> str:
    """A key that is equal for runs that differ only in target domain and seeds."""
    config = scientific(config)
    config["split"] = {**config["split"], "target": None, "trial_seed": None}
    return json.dumps({**config, "seed": None}, sort_keys=True)


def same_work(config: dict) -> str:
    """A key that is equal for runs with the same data set, algorithm class, transform, model and batch size."""
    return json.dumps(
        [config["dataset"]["name"], config["algorithm"]["_target_"], config["trainer"]["transform"], same_model(config)]
    )


def same_model(config: dict) -> str:
    """A key that is equal for runs with the same model, image size, batch size and precision."""
    model, trainer = config["model"], config["trainer"]
    return json.dumps([model["name"], model["image_size"], trainer["batch_size"], trainer["precision"]])


# {name of the rule, which users read: the key that two runs must share}, from the most to the least similar.
RULES: dict[str, Callable[[dict], str]] = {
    "the same method": same_method,
    "the same data set, model, algorithm class and batch size": same_work,
    "the same model and batch size": same_model,
}


# ---- what they cost -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Medians over measured runs.

    Args:
        step: seconds per step.
        evaluation: seconds per evaluation.
        runs: {id of a measured run: the device that it ran on}.
    """

    step: float
    evaluation: float
    runs: dict[str, str]

    def of(self, trainer: dict, steps_done: int = 0) -> float:
        """Seconds that a run with this `trainer` config takes from step `steps_done` to its end."""
        steps, every = trainer["steps"], trainer["eval_every"]
        first = -(-steps_done // every) * every  # the next step with an evaluation
        evaluations = len(range(first, steps, every))
        last_is_extra = trainer["evaluate_last"] and steps_done < steps and (steps - 1) % every != 0
        return max(0, steps - steps_done) * self.step + (evaluations + last_is_extra) * self.evaluation


class MeasuredRuns:
    """The runs that can be used as a measure, grouped by the keys of RULES. Records are read when they are needed.

    Args:
        runs: (folder, config) of each run.
    """

    def __init__(self, runs: Iterable[tuple[Path, dict]]) -> None:
        self._folders: dict[tuple[str, str], list[Path]] = defaultdict(list)  # {(rule, key): run folders}
        for path, config in runs:
            with suppress(KeyError, TypeError):  # a config of another version of gsdg may lack a key that a rule reads
                for rule, key in RULES.items():
                    self._folders[rule, key(config)].append(path)
        self._cost = lru_cache(maxsize=None)(self._compute_cost)
        self._measured = lru_cache(maxsize=None)(measured)

    def cost(self, config: dict) -> tuple[str, Cost | None]:
        """The first rule that finds a measured run, and the cost; ("", None) if no rule finds one."""
        for rule, key in RULES.items():
            if cost := self._cost(rule, key(config)):
                return rule, cost
        return "", None

    def _compute_cost(self, rule: str, key: str) -> Cost | None:
        measurements = []  # (run id, device, (seconds per step, seconds per evaluation))
        for path in self._folders.get((rule, key), []):
            if len(measurements) < ENOUGH and (times := self._measured(path)):
                measurements.append((path.name, device_of(path), times))
        if not measurements:
            return None
        # Only runs of the most frequent device count: a median over two devices would be true of neither.
        (device, _), *_ = Counter(device for _, device, _ in measurements).most_common()
        same_device = [(run_id, times) for run_id, other, times in measurements if other == device]
        step, evaluation = (statistics.median(times[i] for _, times in same_device) for i in (0, 1))
        return Cost(step, evaluation, {run_id: device for run_id, _ in same_device})


def measured(path: Path) -> tuple[float, float] | None:
    """(seconds per step, seconds per evaluation) of one run: medians over its records; None if it has no records yet.

    The record of step 0 is left out, because the first step includes everything that happens only once.
    """
    seconds = [record["seconds"] for record in RunFolder(path).records() if record["step"] > 0 and "seconds" in record]
    if not seconds:
        return None
    step, evaluation = (statistics.median(times[kind] for times in seconds) for kind in ("step", "evaluation"))
    return step, evaluation


def device_of(path: Path) -> str:
    """The device that the run last ran on; "" where none is noted."""
    return next((line["device"] for line in reversed(read_lines(path / "environment.jsonl")) if "device" in line), "")


def on_disk(runs_dir: Path) -> list[tuple[Path, dict]]:
    """(folder, config) of every run in `runs_dir`."""
    files = sorted(Path(runs_dir).glob("[!.]*/config.json"))
    with ThreadPoolExecutor(READER_THREADS) as pool:
        configs = list(pool.map(read_json, files))
    return [(file.parent, config) for file, config in zip(files, configs, strict=True) if "trainer" in config]
