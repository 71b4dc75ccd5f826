"""Does a sweep survive a bad night? A real SLURM of four pretend nodes on this machine, and accidents at random.

    python benchmarks/chaos_slurm.py [--runs 48] [--minutes 6] [--seed 0] [--out RESULT.md]

The sweep is run twice: quietly, and while at random moments tasks are preempted, requeued and cancelled, nodes lose
power or only their slurmd (their jobs live on as orphans), and come back, slurmctld and the launching process are
killed with SIGKILL. The sweep's command is repeated now and then, as its user would in the morning. In the end every
run must be done, with the records and the table of the quiet one. What was done twice is counted. Needs root and
SLURM's packages (README, "A sweep on a cluster").
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "slurm")]
from lab import HALF_A_NODE, Lab, missing, temporary_lab  # noqa: E402

from gsdg.runs import read_json, read_lines  # noqa: E402

RUN = (
    "trainer.workers=0",
    "trainer.batch_size=4",
    "trainer.eval_every=100",
    "trainer.checkpoint_every=50",
    "trainer.log_every=5",
    "model.dropout=0.3",
    "optimizer.lr=1e-3",
    "device=cpu",
)


class Sweep:
    """One sweep of `runs` runs (a multiple of 12) of `steps` steps, launched from processes of its own."""

    def __init__(self, lab: Lab, runs_dir: Path, runs: int, steps: int) -> None:
        seeds = ",".join(map(str, range(runs // 12)))  # two algorithms, six targets
        self.overrides = (
            *RUN,
            f"trainer.steps={steps}",
            "algorithm=erm,grad_surgery",
            "split.target=0,15,30,45,60,75",
            f"split.trial_seed={seeds}",
        )
        self.lab, self.runs_dir, self.runs = lab, runs_dir, runs
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **lab.environment}
        self.launches = 0

    def start(self) -> subprocess.Popen:
        self.launches += 1
        command = [sys.executable, "launch.py", "-m", *HALF_A_NODE, *self.overrides, f"runs_dir={self.runs_dir}"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=REPOSITORY, env=self.environment, **pipes)

    def folders(self) -> list[Path]:
        return sorted(path.parent for path in self.runs_dir.glob("*/status.json"))

    def done(self) -> int:
        return sum(read_json(folder / "status.json").get("state") == "done" for folder in self.folders())

    def finish(self, seconds: float) -> None:
        """Repeat the command until every run is done; RuntimeError if that takes longer."""
        end = time.monotonic() + seconds
        while self.done() < self.runs:
            if time.monotonic() > end:
                raise RuntimeError(f"{self.done()} of {self.runs} done after {seconds:.0f} s")
            if not self.lab.states():
                self.start().wait()
            time.sleep(2)

    def table(self) -> str:
        command = [sys.executable, "-m", "analysis", str(self.runs_dir), "--selection", "training_domain", "last"]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout

    def records(self) -> dict[str, list[dict]]:
        """Of every run what it recorded, but for times."""
        return {
            folder.name: [{**line, "seconds": None} for line in read_lines(folder / "records.jsonl")]
            for folder in self.folders()
        }


class Chaos:
    """Accidents, one at a time, drawn from a seed; `counts` says how many of each."""

    def __init__(self, sweep: Sweep, seed: int) -> None:
        self.sweep, self.lab, self.random = sweep, sweep.lab, random.Random(seed)
        self.counts: Counter[str] = Counter()

    def storm(self, seconds: float) -> None:
        """Every kind at least once, in random order, until the time is over or nothing is left to disturb."""
        kinds = [self.preempt, self.requeue, self.cancel, self.power_off, self.orphan, self.controller, self.launcher]
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.sweep.done() < self.sweep.runs:
            self.random.shuffle(kinds)
            for accident in kinds:
                if accident():
                    self.counts[accident.__doc__.rstrip(".")] += 1
                time.sleep(self.random.uniform(1, 5))

    def _task(self) -> str | None:
        running = [job for job, state in self.lab.states().items() if state == "RUNNING"]
        return self.random.choice(running) if running else None

    def preempt(self) -> bool:
        """preemption by a job of a higher partition."""
        for _ in range(self.lab.nodes):
            self.lab.submit("--partition=high", "--exclusive", "--mem=0", script="sleep 3")
        return True

    def requeue(self) -> bool:
        """requeue by hand."""
        if task := self._task():
            self.lab.run("scontrol", "requeue", task, check=False)
        return bool(task)

    def cancel(self) -> bool:
        """scancel."""
        if task := self._task():
            self.lab.run("scancel", task, check=False)
        return bool(task)

    def power_off(self) -> bool:
        """power failure of a node."""
        return self._lose(self.lab.kill_node)

    def orphan(self) -> bool:
        """loss of a node whose jobs live on."""
        return self._lose(self.lab.kill_slurmd_only)

    def _lose(self, kill) -> bool:
        node = self.random.randrange(1, self.lab.nodes + 1)
        kill(node, told=True)
        time.sleep(self.random.uniform(1, 8))
        self.lab.return_node(node)
        return True

    def controller(self) -> bool:
        """SIGKILL of slurmctld."""
        self.lab.kill_controller()
        time.sleep(self.random.uniform(0, 4))
        self.lab.start_controller()
        return True

    def launcher(self) -> bool:
        """SIGKILL of the launching process."""
        process = self.sweep.start()
        time.sleep(self.random.uniform(2, 12))
        killed = process.poll() is None
        process.kill()
        process.wait()
        return killed


def redone(sweep: Sweep) -> dict[str, int]:
    """What the accidents cost: starts beyond the first, and steps (to within 5) that were logged more than once."""
    starts = steps = 0
    for folder in sweep.folders():
        starts += len(read_lines(folder / "environment.jsonl")) - 1
        reached = 0
        for resumed, step in re.findall(r"resuming at step (\d+)|step (\d+)/", (folder / "log.txt").read_text()):
            if resumed:
                steps += max(0, reached - int(resumed))
            reached = int(resumed or step)
    return {"starts": starts, "steps": steps}


def compare(quiet: Sweep, stormy: Sweep) -> list[str]:
    """What differs between the two: [] is what is wanted."""
    faults = [] if quiet.table() == stormy.table() else ["the tables differ"]
    one, other = quiet.records(), stormy.records()
    faults += [f"run {name}: other records" for name in one if one[name] != other.get(name)]
    return faults + [f"run {name}: only in one sweep" for name in one.keys() ^ other.keys()]


def trial(lab: Lab, folder: Path, *, runs: int, steps: int, seconds: float, seed: int) -> tuple[list[str], list[str]]:
    """(lines that say what happened, what is wrong). Bounded: the quiet and the stormy sweep get 20 minutes each."""
    quiet, stormy = (Sweep(lab, folder / name, runs, steps) for name in ("quiet", "stormy"))
    began = time.monotonic()
    quiet.finish(1200)
    took = time.monotonic() - began
    chaos = Chaos(stormy, seed)
    began = time.monotonic()
    stormy.start().wait()
    chaos.storm(seconds)
    lab.clear()
    before = stormy.done()
    stormy.finish(1200)
    lines = [
        f"{runs} runs of {steps} steps, seed {seed}; quiet: {took:.0f} s; with accidents: "
        f"{time.monotonic() - began:.0f} s",
        *(f"- {count} x {name}" for name, count in sorted(chaos.counts.items())),
        f"done when the accidents ended: {before}; in the end: {stormy.done()} of {stormy.runs}; the command was given "
        f"{stormy.launches} times",
    ]
    cost, total = redone(stormy), runs * steps
    lines.append(
        f"done again: {cost['steps']} of {total} steps ({cost['steps'] / total:.1%}); {cost['starts']} restarts"
    )
    return lines, compare(quiet, stormy)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=48, help="a multiple of 12")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=6, help="of accidents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if why := missing():
        sys.exit(why)
    with temporary_lab(nodes=4) as lab, tempfile.TemporaryDirectory() as folder:
        size = {"runs": options.runs, "steps": options.steps}
        lines, faults = trial(lab, Path(folder), **size, seconds=60 * options.minutes, seed=options.seed)
    lines.append("records and tables equal to the quiet sweep's" if not faults else "\n".join(faults))
    text = "\n".join([time.strftime("%Y-%m-%d, ") + f"{platform.machine()}, {os.cpu_count()} cores", "", *lines])
    print(text)
    if options.out:
        options.out.write_text(f"# benchmarks/chaos_slurm.py\n\n    python {' '.join(sys.argv)}\n\n{text}\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
