"""How long does it take until a large sweep is a table?

    python benchmarks/tables.py [--runs 5000] [--evaluations 50] [--domainbed FOLDER]

Made-up runs of PACS (4 domains, `in` and `out`), a target and trial each; in our format and in DomainBed's, the files
of a run as the two write them. Seconds of `read_runs` alone, then of the whole command `python -m analysis` with two
selections; Python's start is in both. --domainbed: a checkout of DomainBed, whose own collector then reads its share of
the same records (its imports of torch and data sets replaced by the little that it needs of them), two selections too.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timing

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
from gsdg.experiment import prepare  # noqa: E402
from gsdg.identity import run_id  # noqa: E402
from gsdg.sweep.grid import from_command_line  # noqa: E402

READ = "import sys; from analysis.frames import read_runs; assert not read_runs(sys.argv[1]).problems"
DOMAINS = ["art_painting", "cartoon", "photo", "sketch"]
HPARAMS = {"data_augmentation": True, "resnet18": False, "resnet_dropout": 0.0, "class_balanced": False, "lr": 5e-5}
COLLECTOR = """
import sys, types
sys.path.insert(0, sys.argv[1])
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
records = reporting.load_records(sys.argv[2])
for method in (selection.IIDAccuracySelectionMethod, selection.OracleSelectionMethod):
    collect_results.print_results_tables(records, method, False)
"""


def accuracies(rng: random.Random) -> dict[str, dict[str, float]]:
    return {domain: {"in": rng.random(), "out": rng.random()} for domain in DOMAINS}


def our_run(root: Path, number: int, evaluations: int, template: dict) -> None:
    rng = random.Random(number)
    split = template["split"] | {"target": [DOMAINS[number % 4]], "trial_seed": number // 4}
    config = template | {"split": split}
    folder = root / run_id(config)
    folder.mkdir(parents=True)
    status = {"state": "done", "step": 5001, "steps": 5001, "reason": None, "heartbeat": time.time()}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "status.json").write_text(json.dumps(status, indent=2))
    start = {
        "code": "b9ee15179b9f",
        "commit": "de3b05d2",
        "packages": {"torch": "2.14.1"},
        "host": "n1",
        "device": "cpu",
    }
    (folder / "environment.jsonl").write_text(json.dumps(start) + "\n")
    rest = {
        "metrics": {"loss": 1.2345678901234567, "grad_norm": 2.345678901},
        "seconds": {"step": 0.2, "evaluation": 3},
    }
    lines = [{"step": 100 * i, "accuracy": accuracies(rng), **rest} for i in range(evaluations)]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def their_run(root: Path, number: int, evaluations: int, template: dict) -> None:
    rng = random.Random(number)
    folder = root / f"{number:032x}"
    folder.mkdir(parents=True)
    args = {"algorithm": "ERM", "dataset": "PACS", "test_envs": [number % 4], "trial_seed": number // 4}
    args |= {"hparams_seed": 0, "seed": number, "steps": 5001, "hparams": None, "holdout_fraction": 0.2}
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
    composer, jobs, _ = from_command_line(["dataset=pacs", "model=resnet18", "split.target=photo"])
    return prepare(composer.compose(jobs[0])).config


def seconds(*arguments: str) -> float:
    """How long a Python command takes."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return round(time.perf_counter() - began, 1)


def main() -> None:
    parser = timing.options(__doc__, "tables_cpu_202611.csv", rounds=None)
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--evaluations", type=int, default=50)
    parser.add_argument("--domainbed", type=Path)
    args = timing.parsed(parser)
    config, rows = template(), []
    both = ["--selection", "training_domain", "oracle"]
    with tempfile.TemporaryDirectory() as place:
        for kind, write in {"ours": our_run, "DomainBed's": their_run}.items():
            for number in range(args.runs):
                write(Path(place, kind), number, args.evaluations, config)
            path = str(Path(place, kind))
            rows.append({"what": "read_runs", "format": kind, "seconds": seconds("-c", READ, path)})
            rows.append(
                {"what": "python -m analysis", "format": kind, "seconds": seconds("-m", "analysis", path, *both)}
            )
        if args.domainbed:
            theirs = seconds("-c", COLLECTOR, str(args.domainbed.resolve()), path)
            rows.append({"what": "DomainBed's collector", "format": kind, "seconds": theirs})
    shape = {"runs": args.runs, "evaluations": args.evaluations, **timing.provenance(args.device)}
    timing.report([row | shape for row in rows], args.output)


if __name__ == "__main__":
    main()
