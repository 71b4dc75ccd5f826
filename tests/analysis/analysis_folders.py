"""Run folders as runs leave them, written by hand: GSDG's and DomainBed's."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path


def config(algorithm="erm", target="c", trial_seed=0, seed=0, dataset=None, trainer=None, **of_algorithm) -> dict:
    return {
        "dataset": {"name": "toy", "domains": ["a", "b", "c"], **(dataset or {})},
        "split": {"target": target if isinstance(target, list) else [target], "trial_seed": trial_seed},
        "model": {"name": "convnet"},
        "algorithm": {"name": algorithm, **of_algorithm},
        "trainer": {"steps": 10, "workers": 0, "log_every": 1, **(trainer or {})},
        "seed": seed,
        "device": "cpu",
        "data_dir": "data",
        "runs_dir": "runs",
    }


def write_lines(path: Path, lines: Iterable[object]) -> None:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def write_files(folder: Path, files: Mapping[str, str]) -> Path:
    """A folder with these files: {name: text}."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def write_run(runs: Path, name: str, content: dict, records=None, heartbeat=0.0, **status) -> Path:
    """A run folder. records: {step: accuracies}; heartbeat: seconds ago."""
    status = {"state": "done", "step": 10, "steps": 10, "reason": None, **status, "heartbeat": time.time() - heartbeat}
    folder = write_files(runs / name, {"config.json": json.dumps(content), "status.json": json.dumps(status)})
    rows = [{"step": step, "accuracy": accuracy} for step, accuracy in (records or {}).items()]
    write_lines(folder / "records.jsonl", rows)
    return folder


def write_evaluated(
    runs,
    target="photo",
    trial_seed=0,
    accuracy=0.8,
    algorithm="erm",
    *,
    dataset="toy",
    domains=(),
    extra=None,
    **status,
) -> Path:
    """A run of two evaluations, called r000, r001, ... by the number of runs before it.

    The target's `in` accuracy is 0.1 at step 0 and `accuracy` at step 10; every domain's `out` accuracy is 0.2 and 0.9.

    Args:
        target: the names of several targets are joined by "+".
        algorithm: its name, or its node of the config.
        domains: of the data set, photo and art if none are given.
        extra: more nodes of the config.
    """
    of_dataset = {"name": dataset, "domains": list(domains or ("photo", "art"))}
    content = config("", target.split("+"), trial_seed, 0, of_dataset, {"steps": 20}) | dict(extra or {})
    content["algorithm"] = {"name": algorithm} if isinstance(algorithm, str) else algorithm
    records = {}
    for step, inside, out in [(0, 0.1, 0.2), (10, accuracy, 0.9)]:
        records[step] = {domain: {"in": 0.5, "out": out} for domain in ("photo", "art")}
        records[step] |= {domain: {"in": inside, "out": out} for domain in target.split("+")}
    return write_run(runs, f"r{len(list(runs.glob('*'))):03d}", content, records, steps=20, **status)


def domainbed(
    runs: Path, targets: list, curve: dict, *, trial=0, draw=0, done=True, end="\n", n=4, set_to=(), **changes
) -> Path:
    """A run of PACS in DomainBed's format.

    Args:
        curve: {step: accuracies, env0 in, env0 out, env1 in, ...}.
        end: what follows the last line.
        n: number of domains.
        set_to: recorded hyper-parameters that are not those of the draw.
        changes: arguments that are not those of PACS.
    """
    args = {"algorithm": "ERM", "dataset": "PACS", "test_envs": targets, "trial_seed": trial, "hparams_seed": draw}
    args |= {"seed": hash((tuple(targets), trial, draw)), "steps": 301, "hparams": None, "holdout_fraction": 0.2}
    args |= {"output_dir": "x"} | changes
    folder = runs / f"{args['algorithm']}_{trial}_{draw}_{'_'.join(map(str, targets))}_{len(list(runs.glob('*')))}"
    folder.mkdir(parents=True)
    hparams = {"lr": 5e-5 * (draw + 1), "resnet18": True, "nonlinear_classifier": False} | dict(set_to)
    write_results(folder, args, curve, "_acc", end, n, hparams=hparams)
    if done:
        (folder / "done").write_text("done")
    return folder


def write_results(folder: Path, args: dict, curve: dict, suffix: str, end: str = "\n", n: int = 4, **rest) -> None:
    """Append lines to a results.jsonl. suffix: of the accuracies' keys, DomainBed's are env0_in_acc, ..."""
    keys = [f"env{index}_{part}{suffix}" for index in range(n) for part in ("in", "out")]
    rest |= {"epoch": 0.1, "loss": 1.5, "step_time": 0.2, "mem_gb": 3.0, "args": args}
    lines = [
        json.dumps({"step": step, **dict(zip(keys, values, strict=False)), **rest}, sort_keys=True)
        for step, values in curve.items()
    ]
    with (folder / "results.jsonl").open("a") as file:
        file.write("\n".join(lines) + end)
