"""What runs will cost, from what runs on disk took: their records note seconds a step and seconds an evaluation.

A run is compared with runs of the same method first, then with ever more distant kin; what nothing like it was
measured stays unknown. Reading data and starting up is not in the records, so not in the estimate. No torch.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gsdg.errors import listing
from gsdg.identity import scientific
from gsdg.runs import RunFolder, read_json, read_lines

ENOUGH = 12  # measured runs of a kind: more make the median no better
READERS = 16


@dataclass(frozen=True)
class Estimate:
    """seconds: of every run, in order, None where no run like it was measured. rules: {how it was found: runs}.

    measured: ids of the runs that were looked at; devices: what those ran on.
    """

    seconds: list[float | None]
    rules: dict[str, int]
    measured: list[str]
    devices: list[str]

    @property
    def known(self) -> list[float]:
        return [value for value in self.seconds if value is not None]

    @property
    def total(self) -> float:
        """Seconds of all known runs together."""
        return sum(self.known)

    def wall(self, at_once: int) -> float:
        """Seconds until the last known run ends where `at_once` run side by side, each taking the next in order."""
        ends = [0.0] * max(1, min(at_once, len(self.known)))
        for seconds in self.known:
            slot = ends.index(min(ends))
            ends[slot] += seconds
        return max(ends)

    def basis(self) -> str:
        """`from 12 measured runs (the same method: 177 runs; on NVIDIA H100)`, and what stays unknown."""
        unknown = len(self.seconds) - len(self.known)
        parts = [f"from {_runs(len(self.measured), 'measured ')} ("] if self.known else []
        if self.known:
            parts += ["; ".join(f"{rule}: {_runs(count)}" for rule, count in self.rules.items())]
            parts += [f"; on {listing(self.devices)})" if self.devices else ")"]
        if unknown:
            parts += [", " if self.known else "", f"no measured run like these: {_runs(unknown)}"]
        return "".join(parts)


def estimate(
    configs: Sequence[dict],
    runs_dir: Path,
    done: Sequence[int] | None = None,
    kin: Iterable[tuple[Path, dict]] | None = None,
) -> Estimate:
    """Seconds that runs of these configs would take. done: how many steps each has behind it, if any.

    Every run under `runs_dir`, or of `kin` (folder and config), that recorded an evaluation after its first step may
    serve as a measure.
    """
    book = Measures(on_disk(runs_dir) if kin is None else kin)
    seconds, rules, used = [], Counter(), {}
    for config, begun in zip(configs, done or [0] * len(configs), strict=True):
        rule, cost = book.cost(config)
        seconds.append(cost and cost.of(config["trainer"], begun))
        if cost:
            rules[rule] += 1
            used.update(cost.runs)
    return Estimate(seconds, dict(rules), sorted(used), sorted({device for device in used.values() if device}))


def same_method(config: dict) -> str:
    """Of two runs that differ in the target and the seeds only, the same text."""
    config = scientific(config)
    config["split"] = {**config["split"], "target": None, "trial_seed": None}
    return json.dumps({**config, "seed": None}, sort_keys=True)


def same_work(config: dict) -> str:
    return json.dumps(
        [config["dataset"]["name"], config["algorithm"]["_target_"], config["trainer"]["transform"], same_model(config)]
    )


def same_model(config: dict) -> str:
    model, trainer = config["model"], config["trainer"]
    return json.dumps([model["name"], model["image_size"], trainer["batch_size"], trainer["precision"]])


# From the closest kin to the most distant: {what a user reads: the key two runs must share}.
RULES: dict[str, Callable[[dict], str]] = {
    "the same method": same_method,
    "the same data set, model, algorithm class and batch size": same_work,
    "the same model and batch size": same_model,
}


@dataclass(frozen=True)
class Cost:
    """Medians over measured runs. step, evaluation: seconds; runs: {run id: the device it ran on}."""

    step: float
    evaluation: float
    runs: dict[str, str]

    def of(self, trainer: dict, begun: int = 0) -> float:
        """Seconds from step `begun` to the end."""
        steps, every = trainer["steps"], trainer["eval_every"]
        evaluations = len(range(-(-begun // every) * every, steps, every))
        last_is_extra = trainer["evaluate_last"] and begun < steps and (steps - 1) % every != 0
        return max(0, steps - begun) * self.step + (evaluations + last_is_extra) * self.evaluation


class Measures:
    """The runs that can serve as a measure, by what they have in common; records are read when they are asked for."""

    def __init__(self, runs: Iterable[tuple[Path, dict]]) -> None:
        self._kin: dict[tuple[str, str], list[Path]] = defaultdict(list)
        for path, config in runs:
            with suppress(KeyError, TypeError):  # a config of another version of gsdg may lack what a rule looks at
                for rule, key in RULES.items():
                    self._kin[rule, key(config)].append(path)
        self._cost = lru_cache(maxsize=None)(self._costs)
        self._measured = lru_cache(maxsize=None)(measured)

    def cost(self, config: dict) -> tuple[str, Cost | None]:
        """The first rule that finds a measured run, and what that costs."""
        for rule, key in RULES.items():
            if cost := self._cost(rule, key(config)):
                return rule, cost
        return "", None

    def _costs(self, rule: str, key: str) -> Cost | None:
        found = []
        for path in self._kin.get((rule, key), []):
            if len(found) < ENOUGH and (times := self._measured(path)):
                found.append((path.name, device_of(path), times))
        if not found:
            return None
        (device, _), *_ = Counter(device for _, device, _ in found).most_common()  # a mixture would be true of neither
        like = [(name, times) for name, other, times in found if other == device]
        step, evaluation = (statistics.median(times[i] for _, times in like) for i in (0, 1))
        return Cost(step, evaluation, {name: device for name, _ in like})


def measured(path: Path) -> tuple[float, float] | None:
    """(seconds a step, seconds an evaluation) of one run: medians over its records, or None if it has none yet.

    The record of step 0 is left out: its one step includes everything that happens once.
    """
    seconds = [record["seconds"] for record in RunFolder(path).records() if record["step"] > 0 and "seconds" in record]
    if not seconds:
        return None
    step, evaluation = (statistics.median(times[kind] for times in seconds) for kind in ("step", "evaluation"))
    return step, evaluation


def device_of(path: Path) -> str:
    """What the run last ran on, "" if it does not say."""
    return next((line["device"] for line in reversed(read_lines(path / "environment.jsonl")) if "device" in line), "")


def on_disk(runs_dir: Path) -> list[tuple[Path, dict]]:
    """Every run folder with its config."""
    folders = sorted(Path(runs_dir).glob("[!.]*/config.json"))
    with ThreadPoolExecutor(READERS) as pool:
        configs = list(pool.map(read_json, folders))
    return [(path.parent, config) for path, config in zip(folders, configs, strict=True) if "trainer" in config]


def _runs(count: int, kind: str = "") -> str:
    return f"{count} {kind}run{'s' if count != 1 else ''}"
