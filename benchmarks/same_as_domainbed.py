"""Compares our model selection with DomainBed's own code. Needs a checkout of DomainBed, and tqdm, which it imports.

    python benchmarks/same_as_domainbed.py FOLDER [--sweeps 140]

First synthetic sweeps of PACS in DomainBed's format, one per seed: two algorithms, up to three trial seeds and twelve
draws, one and two targets, few distinct accuracy values (so that there are many ties), and runs that are missing or
stopped early. Then the 40 real VLCS runs that DomainBed ships (domainbed/misc/test_sweep_data). Every accuracy that
DomainBed's three selection methods report must be equal to ours bit for bit, and where they report none, we must
report none.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from gsdg.analysis.read.domainbed_runs import DATASETS  # noqa: E402
from gsdg.analysis.read.frames import read_runs  # noqa: E402
from gsdg.analysis.selection import leave_one_domain_out, oracle, training_domain  # noqa: E402

TARGETS = [[i] for i in range(4)] + [list(pair) for pair in combinations(range(4), 2)]
STEPS = [0, 300, 600, 900]


def make(root: Path, rng: random.Random) -> None:
    """Write a synthetic sweep of PACS to `root`."""
    values = [rng.random() for _ in range(rng.choice([2, 3, 5, 50]))]
    gaps = rng.choice([0, 0, 0.05, 0.2])
    for algorithm in ("ERM", "CORAL"):
        for trial in range(rng.choice([1, 2, 3])):
            for draw in range(rng.choice([1, 2, 12])):
                for targets in TARGETS:
                    if rng.random() >= gaps:
                        steps = STEPS[: rng.choice([1, 2, 3])] if rng.random() < gaps else STEPS
                        args = {"algorithm": algorithm, "dataset": "PACS", "test_envs": targets, "trial_seed": trial}
                        args |= {"hparams_seed": draw, "seed": rng.getrandbits(30), "steps": 901}
                        write(root / f"{rng.getrandbits(60):x}", args, steps, values, rng)


def write(folder: Path, args: dict, steps: list[int], values: list[float], rng: random.Random) -> None:
    """Write one run, with accuracies drawn from `values`."""
    folder.mkdir()
    keys = [f"env{i}_{part}_acc" for i in range(4) for part in ("in", "out")]
    lines = [{"step": step, "args": args, "hparams": {}, **{key: rng.choice(values) for key in keys}} for step in steps]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "done").write_text("done")


def differences(folder: Path) -> tuple[int, int, list[str]]:
    """(number of equal cells, number of cells that are empty in both, descriptions of different cells)."""
    from domainbed import model_selection as theirs
    from domainbed.lib import reporting

    groups = reporting.get_grouped_records(reporting.load_records(str(folder)))
    records = read_runs(folder).finished()
    equal = empty = 0
    different = []
    for method, ours in {
        theirs.IIDAccuracySelectionMethod: training_domain,
        theirs.LeaveOneOutSelectionMethod: leave_one_domain_out,
        theirs.OracleSelectionMethod: oracle,
    }.items():
        chosen = {(row.algorithm, row.target, row.trial_seed): row.accuracy for row in ours(records).itertuples()}
        for group in groups:
            target = DATASETS[group["dataset"]][1][group["test_env"]]
            cell = f"{group['algorithm']} (DomainBed)", target, group["trial_seed"]
            expected, accuracy = method.sweep_acc(group["records"]), chosen.get(cell)
            if expected != accuracy:
                different.append(f"{folder} {method.name} {cell}: {expected}, ours {accuracy}")
            elif accuracy is None:
                empty += 1
            else:
                equal += 1
    return equal, empty, different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domainbed", type=Path)
    parser.add_argument("--sweeps", type=int, default=140)
    options = parser.parse_args()
    sys.path.append(str(options.domainbed))
    synthetic = []
    for seed in range(options.sweeps):
        with tempfile.TemporaryDirectory() as root:
            make(Path(root), random.Random(seed))
            synthetic.append(differences(Path(root)))
    example = options.domainbed / "domainbed" / "misc" / "test_sweep_data"
    for name, results in {"synthetic": synthetic, "DomainBed's example": [differences(example)]}.items():
        equal, empty = (sum(result[column] for result in results) for column in (0, 1))
        different = [line for result in results for line in result[2]]
        print(f"{name}: {len(results)} sweeps, {equal} cells equal, {empty} empty in both, {len(different)} different")
        print("\n".join(different[:20]), end="\n" if different else "")


if __name__ == "__main__":
    main()
