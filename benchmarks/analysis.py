"""How long does it take until a large sweep is a table?

    python benchmarks/analysis.py [--runs 5000] [--evaluations 50] [--domainbed FOLDER] [--output FILE]

Made-up runs of PACS (4 domains, `in` and `out`), an algorithm, target and trial for each; in our format and in
DomainBed's, the files of a run as the two write them. Seconds of `read_runs` alone, then of the whole command
`python -m analysis`, Python's start included. --domainbed: a checkout of DomainBed, whose own collector then reads a
part of the same records on the same machine (its imports of torch and datasets replaced by what it needs of them).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timing

REPOSITORY = Path(__file__).parents[1]
DOMAINS = ["art_painting", "cartoon", "photo", "sketch"]
HPARAMS = {"data_augmentation": True, "resnet18": False, "resnet_dropout": 0.0, "class_balanced": False, "lr": 5e-5}
COLLECTOR = """
import sys, types
for name in ("tqdm", "domainbed.datasets", "domainbed.algorithms", "domainbed.lib.misc"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["tqdm"].tqdm = lambda it, **kwargs: it
datasets, algorithms, misc = (sys.modules[f"domainbed.{m}"] for m in ("datasets", "algorithms", "lib.misc"))
import domainbed, domainbed.lib
domainbed.datasets, domainbed.algorithms, domainbed.lib.misc = datasets, algorithms, misc
algorithms.ALGORITHMS, datasets.DATASETS = [], ["PACS", "VLCS"]
datasets.num_environments = lambda name: 4
datasets.get_dataset_class = lambda name: types.SimpleNamespace(ENVIRONMENTS=["0", "1", "2", "3"])
misc.print_row = lambda row, **kwargs: print("  ".join(map(str, row)))
from domainbed.lib import reporting
from domainbed.scripts import collect_results
from domainbed import model_selection as selection
records = reporting.load_records(sys.argv[1])
for method in (selection.IIDAccuracySelectionMethod, selection.OracleSelectionMethod):
    collect_results.print_results_tables(records, method, False)
"""


def accuracies(rng: random.Random) -> dict[str, dict[str, float]]:
    return {domain: {"in": rng.random(), "out": rng.random()} for domain in DOMAINS}


def our_run(folder: Path, number: int, evaluations: int, template: dict) -> None:
    rng = random.Random(number)
    config = json.loads(json.dumps(template))
    config["split"] |= {"target": [DOMAINS[number % 4]], "trial_seed": number // 4}
    status = {"state": "done", "step": 5001, "steps": 5001, "reason": None, "heartbeat": time.time()}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "status.json").write_text(json.dumps(status, indent=2))
    rest = {
        "metrics": {"loss": 1.2345678901234567, "grad_norm": 2.345678901},
        "seconds": {"step": 0.2, "evaluation": 3},
    }
    lines = [{"step": 100 * i, "accuracy": accuracies(rng), **rest} for i in range(evaluations)]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def their_run(folder: Path, number: int, evaluations: int) -> None:
    rng = random.Random(number)
    args = {"algorithm": "ERM", "dataset": "PACS", "test_envs": [number % 4], "trial_seed": number // 4}
    args |= {"hparams_seed": 0, "seed": 0, "steps": 5001, "hparams": None, "holdout_fraction": 0.2}
    args |= {"checkpoint_freq": None, "data_dir": "/data", "output_dir": str(folder), "task": "domain_generalization"}
    lines = []
    for i in range(evaluations):
        found = accuracies(rng)
        flat = {f"env{n}_{part}_acc": found[name][part] for n, name in enumerate(DOMAINS) for part in ("in", "out")}
        record = {"step": 100 * i, "epoch": i, "loss": 1.2345, "step_time": 0.2, "mem_gb": 8.1, **flat}
        lines.append(json.dumps(record | {"args": args, "hparams": HPARAMS}, sort_keys=True))
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "done").write_text("done")


def template() -> dict:
    """A resolved config, as a real run has it."""
    sys.path.insert(0, str(REPOSITORY))
    from gsdg.experiment import prepare
    from gsdg.sweep.grid import from_command_line

    composer, jobs, _ = from_command_line(["dataset=pacs", "model=resnet18", "split.target=photo"])
    return prepare(composer.compose(jobs[0])).config


def seconds(*command: str, **environment: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, env=environment or None)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--evaluations", type=int, default=50)
    parser.add_argument("--domainbed", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows, config = [], template()
    read = "import sys; from analysis.frames import read_runs; assert not read_runs(sys.argv[1]).problems"
    with tempfile.TemporaryDirectory() as place:
        for kind in ("ours", "theirs"):
            for number in range(options.runs):
                write = our_run if kind == "ours" else their_run
                write(Path(place, kind), number, options.evaluations, config)
            path = str(Path(place, kind))
            both = ["--selection", "training_domain", "oracle"]
            rows.append({"what": f"read_runs, {kind}", "seconds": seconds(sys.executable, "-c", read, path)})
            table = seconds(sys.executable, "-m", "analysis", path, *both)
            rows.append({"what": f"python -m analysis, {kind}", "seconds": table})
        if options.domainbed:
            theirs = seconds(sys.executable, "-c", COLLECTOR, path, PYTHONPATH=str(options.domainbed))
            rows.append({"what": "DomainBed's collector, theirs", "seconds": theirs})
    for row in rows:
        row |= {"runs": options.runs, "evaluations": options.evaluations}
    timing.report(rows, options.output)


if __name__ == "__main__":
    main()
