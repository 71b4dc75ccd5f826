"""Time to submit and to inspect large sweeps, on a real SLURM with four simulated nodes on this machine.

    python benchmarks/sweep.py [--output benchmarks/results/sweep_cpu_202611.csv]

- submit: `python launch.py -m` of 2,000 runs (enumerate, check, leave out the runs that are done, freeze, submit); of
  1,500 runs in two arrays, because MaxArraySize is 1001; and of the same 1,500 runs again when 1,000 are done;
- plan: of 10,000 runs, none of which exists;
- status: of 10,000 run folders.

Seconds of whole commands, including the start of Python. The jobs are submitted on hold and then cancelled: only the
work before a job starts is measured. Needs root and SLURM's packages (CONTRIBUTING.md, "Tests on SLURM").
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timing

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "slurm")]
from lab import Lab, missing, temporary_lab  # noqa: E402

from gsdg.sweep.folder import FrozenRun, SweepFolder, find_sweep  # noqa: E402

GRID = (  # 500 runs per alpha
    "algorithm.n_parts=1,5,10,20",
    "split.target=0,15,30,45,60",
    f"split.trial_seed={','.join(map(str, range(25)))}",
)
SLURM = (
    "hydra/launcher=slurm_cpu",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=1",
    "+hydra.launcher.additional_parameters.hold=true",
)


def seconds(lab: Lab, *arguments: str) -> tuple[float, str]:
    """(seconds that a Python command takes, its stdout)."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **lab.environment},
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1, 3):
        sys.exit(done.stdout + done.stderr)
    return time.perf_counter() - began, done.stdout


def submit(lab: Lab, runs_dir: Path, alphas: str) -> tuple[float, str]:
    """Submit a sweep of 500 runs per alpha."""
    return seconds(lab, "launch.py", "-m", *SLURM, *GRID, f"algorithm.alpha={alphas}", f"runs_dir={runs_dir}")


def finish(runs_dir: Path, count: int) -> None:
    """Make it look as if the first `count` runs were done: write their folders, without weights and log."""
    for run in find_sweep(runs_dir).runs()[:count]:
        make(runs_dir / run.run_id, run, "done")


def make(folder: Path, run: FrozenRun, state: str) -> None:
    """Write the folder of a run in this state."""
    folder.mkdir()
    now = time.time()
    status = {"state": state, "step": 5001, "steps": 5001, "heartbeat": now, "host": "n1", "pid": 1, "job": None}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "config.json").write_text(json.dumps(run.config))
    record = {"step": 300, "accuracy": {}, "metrics": {}, "seconds": {"step": 0.2, "evaluation": 3.0}}
    (folder / "records.jsonl").write_text((json.dumps(record) + "\n") * 17)


def ten_thousand(runs_dir: Path, template: dict) -> None:
    """Write a sweep of 10,000 runs: 8,000 done, 1,000 running, 500 failed, 500 missing."""
    runs = [FrozenRun(f"{number:012x}", [f"seed={number}"], {**template, "seed": number}) for number in range(10_000)]
    sweep = SweepFolder(runs_dir / ".sweeps" / "2026-01-01_00-00-00-0")
    sweep.write({"overrides": [], "launcher": {}}, runs)
    states = ["done"] * 8000 + ["running"] * 1000 + ["failed"] * 500
    for run, state in zip(runs, states, strict=False):
        make(runs_dir / run.run_id, run, state)


def main() -> None:
    parser = timing.options(__doc__, "sweep_cpu_202611.csv", rounds=None)
    args = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    rows = []

    def note(what: str, measured: tuple[float, str], target: float) -> None:
        """Add a row, and print it with the first lines of the command's output. target: seconds."""
        taken, output = measured
        rows.append({"what": what, "seconds": round(taken, 1), "target": target, **timing.provenance(args.device)})
        print(f"{what}: {taken:.1f} s (target {target:.0f})", *output.splitlines()[:3], sep="\n    ", flush=True)

    with temporary_lab(nodes=4) as lab, tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        note("submit 2,000 runs", submit(lab, place / "a", "0,0.3,0.6,1"), 60)
        lab.clear()
        note("submit 1,500 runs, MaxArraySize 1001", submit(lab, place / "b", "0,0.3,0.6"), 60)
        lab.clear()
        finish(place / "b", 1000)
        note("the same again, 1,000 done", submit(lab, place / "b", "0,0.3,0.6"), 60)
        lab.clear()
        alphas = ",".join(str(number / 20) for number in range(20))
        plan = ["-m", "gsdg.sweep", "plan", *GRID, f"algorithm.alpha={alphas}", f"runs_dir={place / 'd'}"]
        note("plan 10,000 runs", seconds(lab, *plan), 60)
        ten_thousand(place / "c", find_sweep(place / "b").runs()[0].config)
        note("status of 10,000 runs", seconds(lab, "-m", "gsdg.sweep", "status", "--runs-dir", str(place / "c")), 10)
    timing.report(rows, args.output)


if __name__ == "__main__":
    main()
