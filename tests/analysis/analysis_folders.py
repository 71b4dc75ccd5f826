"""Run folders as a run leaves them, written by hand."""

from __future__ import annotations

import json
import time
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


def write_run(runs: Path, name: str, content: dict, records=None, heartbeat=0.0, **status) -> Path:
    """A run folder; `heartbeat`: seconds ago."""
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content))
    status = {"state": "done", "step": 10, "steps": 10, "reason": None, **status}
    (folder / "status.json").write_text(json.dumps({**status, "heartbeat": time.time() - heartbeat}))
    lines = [json.dumps({"step": step, "accuracy": accuracy}) + "\n" for step, accuracy in (records or {}).items()]
    (folder / "records.jsonl").write_text("".join(lines))
    return folder
