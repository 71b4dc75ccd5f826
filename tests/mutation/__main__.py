"""python -m tests.mutation: draws mutants of gsdg and reports how many of them the fast tests notice."""

from __future__ import annotations

import argparse
import csv
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple
from pathlib import Path
from queue import Queue

from gsdg.utils.text import align_columns
from tests.mutation.mutator import Mutant, mutants_of
from tests.mutation.runner import ROOT, Baseline, Copy, Outcome

SEED = 0
MINIMUM = 15  # mutants of each package, if it has as many
MODULES = "modules"  # stands for the package of the modules directly in gsdg/
NOT_MUTATED = ("gsdg/surgery/kernels/triton_kernels.py",)  # without a GPU most of it is not run
TESTS: Mapping[str, Sequence[str]] = {  # package: the tests that cover it
    "utils": (
        "tests/utils",
        "tests/test_trainer.py",
        "tests/data/test_any_bytes.py",
        "tests/data/test_workers.py",
        "tests/runs/test_checkpoint.py",
        "tests/test_mistakes.py",
        "tests/test_shown.py",
        "tests/test_stop.py",
    ),
    "config": ("tests/config", "tests/wiring", "tests/test_mistakes.py", "tests/test_user_presets.py"),
    "data": ("tests/data",),
    "models": ("tests/models", "tests/test_export.py", "tests/test_predict.py", "tests/wiring"),
    "surgery": ("tests/surgery", "tests/algorithms/test_grad_surgery.py"),
    "algorithms": ("tests/algorithms", "tests/wiring"),
    "averaging": ("tests/averaging", "tests/test_soup.py"),
    "runs": (
        "tests/runs",
        "tests/sweep/test_submit.py",
        "tests/test_predict.py",
        "tests/test_resume.py",
        "tests/test_schedules.py",
        "tests/test_soup.py",
        "tests/test_stop.py",
    ),
    "sweep": ("tests/sweep", "tests/runs/test_reuse.py", "tests/slurm/test_slurm_messages.py", "tests/test_launch.py"),
    "analysis": ("tests/analysis",),
    "metrics": (
        "tests/metrics",
        "tests/test_evaluate.py",
        "tests/test_predictions.py",
        "tests/analysis/test_metric.py",
        "tests/analysis/test_prediction_figures.py",
    ),
    "evaluation": ("tests/test_evaluate.py", "tests/test_predictions.py", "tests/test_trainer.py", "tests/wiring"),
    "evaluate": ("tests/test_evaluate_command.py",),
    "adaptation": ("tests/adaptation",),
    MODULES: (
        "tests/test_evaluate.py",
        "tests/test_trainer.py",
        "tests/test_experiment.py",
        "tests/test_bad_input.py",
        "tests/test_export.py",
        "tests/test_launch.py",
        "tests/test_mistakes.py",
        "tests/test_optimizer_groups.py",
        "tests/test_predict.py",
        "tests/test_resume.py",
        "tests/test_shown.py",
        "tests/test_schedules.py",
        "tests/test_soup.py",
        "tests/test_stop.py",
        "tests/test_user_classes.py",
        "tests/averaging",
        "tests/models/test_trainable.py",
        "tests/wiring",
    ),
}


def main() -> None:
    options = _parse()
    mutants = drawn(options.count, options.only)
    if options.list:
        print("\n".join(_describe(mutant) for mutant in mutants))
        return
    results = _read(options.output) if options.resume else {}
    waiting = [mutant for mutant in mutants if mutant.name not in results]
    with options.output.open("a" if results else "w", newline="") as file:
        for outcome in _outcomes(waiting, options.workers):
            csv.writer(file).writerow(astuple(outcome))
            file.flush()
            results[outcome.name] = outcome.result
            print(f"{len(results)} {outcome.result} {outcome.name} {outcome.seconds} s {outcome.test}", flush=True)
    print(report([mutant for mutant in mutants if mutant.name in results], results))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--count", type=int, default=240, metavar="N", help="mutants to draw (default: 240)")
    parser.add_argument("--only", choices=TESTS, help="draw from this package only")
    parser.add_argument("--workers", type=int, default=2, help="test runs at the same time (default: 2)")
    parser.add_argument("--output", type=Path, default=Path("mutants.csv"), help="CSV file with one line per mutant")
    parser.add_argument("--resume", action="store_true", help="skip the mutants that are already in the output")
    parser.add_argument("--list", action="store_true", help="print the drawn mutants and run nothing")
    return parser.parse_args()


def drawn(count: int, only: str | None) -> list[Mutant]:
    """The mutants of a sample: MINIMUM per package, and the rest in proportion to the packages' sizes.

    The order within a package is fixed, so a larger sample contains a smaller one.
    """
    packages = {package: list(_shuffled(package)) for package in TESTS if only in (None, package)}
    least = min(MINIMUM, count // len(packages))
    shares = {package: min(least, len(mutants)) for package, mutants in packages.items()}
    while sum(shares.values()) < min(count, sum(map(len, packages.values()))):
        shares[min(packages, key=lambda package: shares[package] / len(packages[package]))] += 1
    return [mutant for package, mutants in packages.items() for mutant in mutants[: shares[package]]]


def _shuffled(package: str) -> list[Mutant]:
    files = (ROOT / "gsdg").glob("*.py") if package == MODULES else (ROOT / "gsdg" / package).rglob("*.py")
    paths = sorted({str(file.relative_to(ROOT)) for file in files} - set(NOT_MUTATED))
    mutants = [mutant for path in paths for mutant in mutants_of(path, (ROOT / path).read_text())]
    return random.Random(f"{SEED} {package}").sample(mutants, len(mutants))


def _package_of(mutant: Mutant) -> str:
    parts = Path(mutant.path).parts
    return parts[1] if len(parts) > 2 else MODULES


def _outcomes(mutants: Sequence[Mutant], workers: int) -> Iterator[Outcome]:
    """Measure the unmutated tests of each package, then try the mutants; `workers` of them at the same time."""
    copies: Queue[Copy] = Queue()
    for _ in range(workers if mutants else 0):
        copies.put(Copy())
    packages = sorted(set(map(_package_of, mutants)))
    with ThreadPoolExecutor(workers) as pool:
        baselines = dict(zip(packages, pool.map(lambda package: _measure(copies, package), packages), strict=True))
        tries = [pool.submit(_try, copies, mutant, baselines[_package_of(mutant)]) for mutant in mutants]
        try:
            yield from (done.result() for done in as_completed(tries))
        finally:  # after an interruption, wait only for the tests that are running
            for unfinished in tries:
                unfinished.cancel()


def _measure(copies: Queue[Copy], package: str) -> Baseline:
    copy = copies.get()
    try:
        baseline = copy.measure(TESTS[package])
    finally:
        copies.put(copy)
    seconds = baseline.start + sum(baseline.files.values())
    print(f"{package}: the tests pass without a mutant in {seconds:.0f} s", flush=True)
    return baseline


def _try(copies: Queue[Copy], mutant: Mutant, baseline: Baseline) -> Outcome:
    copy = copies.get()
    try:
        return copy.try_mutant(mutant, TESTS[_package_of(mutant)], baseline)
    finally:
        copies.put(copy)


def _read(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row[0]: row[2] for row in csv.reader(file)}


def report(mutants: Iterable[Mutant], results: Mapping[str, str]) -> str:
    """A table of killed and drawn mutants per package (a timeout counts as killed), and the survivors."""
    survivors = [mutant for mutant in mutants if results[mutant.name] == "survived"]
    total, survived = Counter(map(_package_of, mutants)), Counter(map(_package_of, survivors))
    rows = [(package, str(total[package] - survived[package]), str(total[package])) for package in total]
    rows.append(("all", str(total.total() - survived.total()), str(total.total())))
    table = align_columns([("package", "killed", "drawn"), *rows], numbers=True)
    return "\n".join(["", *table, "", "survivors:", *map(_describe, survivors)])


def _describe(mutant: Mutant) -> str:
    old, new = (" ".join(text.split()) for text in (mutant.old, mutant.new))
    return f"{mutant.path}:{mutant.line}:{mutant.column} {mutant.kind}: {old} -> {new or '(nothing)'}"


if __name__ == "__main__":
    main()
