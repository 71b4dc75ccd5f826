"""Time to make the tables and the HTML page of a large sweep.

    python benchmarks/tables.py [--runs 5000] [--methods 1 1000] [--evaluations 50] [--domainbed FOLDER]

Synthetic runs of PACS (4 domains, `in` and `out`): every run has its own target, method and trial seed, and methods
differ in one swept key. They are written in our format and in DomainBed's, with the files that a real run has. Measured
are `read_runs` alone; the whole command `python -m analysis` with two selections; and `python -m analysis report` of
our runs (--report: number of runs and of methods). Each is measured in wall seconds and CPU seconds, including the
start of Python; also the memory of the frame of records, and the size of the page.
--domainbed: a checkout of DomainBed. Its own collector then reads the runs in its format, also with two selections. Its
imports of torch and of data sets are replaced by the few things that the collector needs from them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timing

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
from gsdg.config.identity import run_id  # noqa: E402
from gsdg.plan import prepare  # noqa: E402
from gsdg.sweep.compose import from_command_line  # noqa: E402

TARGETS = 4
READ = """
import sys
from gsdg.analysis.read.frames import read_runs
runs = read_runs(sys.argv[1])
assert not runs.problems
print(runs.records.memory_usage(deep=True).sum())
"""
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
    """Random accuracies of one evaluation: {domain: {"in", "out"}}."""
    return {domain: {"in": rng.random(), "out": rng.random()} for domain in DOMAINS}


def place_of(number: int, methods: int) -> tuple[int, int, int]:
    """(target, method, trial seed) of run `number`: the target changes fastest, then the method."""
    return number % TARGETS, number // TARGETS % methods, number // (TARGETS * methods)


def our_run(root: Path, number: int, evaluations: int, methods: int, template: dict) -> None:
    """Write run `number` in our format. template: the resolved config of a run."""
    rng = random.Random(number)
    target, method, trial = place_of(number, methods)
    split = template["split"] | {"target": [DOMAINS[target]], "trial_seed": trial}
    config = template | {"split": split, "optimizer": template["optimizer"] | {"lr": (method + 1) / 2**20}}
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


def their_run(root: Path, number: int, evaluations: int, methods: int, template: dict) -> None:
    """Write run `number` in DomainBed's format."""
    rng = random.Random(number)
    target, method, trial = place_of(number, methods)
    hparams = HPARAMS | {"lr": (method + 1) / 2**20}
    folder = root / f"{number:032x}"
    folder.mkdir(parents=True)
    args = {"algorithm": "ERM", "dataset": "PACS", "test_envs": [target], "trial_seed": trial}
    args |= {"hparams_seed": 0, "seed": number, "steps": 5001, "hparams": None, "holdout_fraction": 0.2}
    args |= {"checkpoint_freq": None, "data_dir": "/data", "output_dir": str(folder), "task": "domain_generalization"}
    lines = []
    for i in range(evaluations):
        accuracy = accuracies(rng)
        flat = {f"env{n}_{part}_acc": accuracy[name][part] for n, name in enumerate(DOMAINS) for part in ("in", "out")}
        record = {"step": 100 * i, "epoch": i, "loss": 1.2345, "step_time": 0.2, "mem_gb": 8.1, **flat}
        lines.append(json.dumps(record | {"args": args, "hparams": hparams}, sort_keys=True))
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "done").write_text("done")


def template() -> dict:
    """The resolved config of a real run."""
    composer, jobs, _ = from_command_line(["dataset=pacs", "model=resnet18", "split.target=photo"])
    return prepare(composer.compose(jobs[0])).config


def cost(*arguments: str) -> tuple[dict[str, float], str]:
    """({"seconds", "cpu_seconds"} of a Python command, its output)."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen([sys.executable, *arguments], cwd=REPOSITORY, stdout=output, stderr=output)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode()
    if child.returncode:
        sys.exit(text)
    taken = {"seconds": time.perf_counter() - began, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    return {name: round(value, 1) for name, value in taken.items()}, text


def main() -> None:
    parser = timing.options(__doc__, "tables_cpu_202611.csv", rounds=None)
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--methods", type=int, nargs="+", default=[1, 1000])
    parser.add_argument("--evaluations", type=int, default=50)
    parser.add_argument("--report", type=int, nargs=2, default=[2000, 167], metavar=("RUNS", "METHODS"))
    parser.add_argument("--formats", nargs="+", default=["ours", "DomainBed's"])
    parser.add_argument("--domainbed", type=Path)
    args = timing.parsed(parser)
    config, rows = template(), []

    def note(what: str, kind: str, runs: int, methods: int, *command: str, page: Path | None = None) -> None:
        """Run the command, add a row with its cost, and print it."""
        taken, text = cost(*command)
        taken["records_mb"] = round(int(text) / 1e6, 1) if what == "read_runs" else ""
        taken["page_mb"] = round(page.stat().st_size / 1e6, 1) if page else ""
        shape = {"runs": runs, "methods": methods, "evaluations": args.evaluations}
        rows.append({"what": what, "format": kind, **taken, **shape})
        print(rows[-1], flush=True)

    both = ["--selection", "training_domain", "oracle"]
    for methods in args.methods:
        for kind, write in {"ours": our_run, "DomainBed's": their_run}.items():
            if kind not in args.formats:
                continue
            with tempfile.TemporaryDirectory() as path:
                for number in range(args.runs):
                    write(Path(path), number, args.evaluations, methods, config)
                note("read_runs", kind, args.runs, methods, "-c", READ, path)
                note("python -m analysis", kind, args.runs, methods, "-m", "analysis", path, *both)
                if args.domainbed and kind == "DomainBed's":
                    theirs = ["-c", COLLECTOR, str(args.domainbed.resolve()), path]
                    note("DomainBed's collector", kind, args.runs, methods, *theirs)
    runs, methods = args.report
    with tempfile.TemporaryDirectory() as path:
        for number in range(runs):
            our_run(Path(path), number, args.evaluations, methods, config)
        command = ["-m", "analysis", "report", path, "-o", f"{path}/.page"]
        page = Path(path, ".page", "index.html")
        if runs:
            note("python -m analysis report", "ours", runs, methods, *command, page=page)
    timing.report([row | timing.provenance(args.device) for row in rows], args.output)


if __name__ == "__main__":
    main()
