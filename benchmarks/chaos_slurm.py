"""Stress test of a sweep: a real SLURM with four simulated nodes on this machine, and random faults.

    python benchmarks/chaos_slurm.py [--runs 48] [--minutes 6] [--seed 0] [--out RESULT.md]

The sweep is run twice, once undisturbed and once with faults. At random moments tasks are preempted, requeued and
cancelled; nodes lose power, or only their slurmd, so that their jobs keep running, and come back; and slurmctld and the
launching process are killed with SIGKILL. The sweep's command is repeated now and then, as a user would do. In the end
every run must be done, with the same records and the same table as in the undisturbed sweep. The result reports how
many steps were done twice. Needs root and SLURM's packages (CONTRIBUTING.md, "Tests on SLURM").
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

from gsdg.utils.json_files import read_json, read_lines  # noqa: E402

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
    """A sweep of `runs` runs (a multiple of 12) of `steps` steps; each launch is a separate process."""

    def __init__(self, lab: Lab, runs_dir: Path, runs: int, steps: int) -> None:
        seeds = ",".join(map(str, range(runs // 12)))  # a seed has 12 runs: two algorithms x six targets
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
        """Give the sweep's command; returns the launching process."""
        self.launches += 1
        command = [sys.executable, "launch.py", "-m", *HALF_A_NODE, *self.overrides, f"runs_dir={self.runs_dir}"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=REPOSITORY, env=self.environment, **pipes)

    def folders(self) -> list[Path]:
        """The folders of the runs that have started."""
        return sorted(path.parent for path in self.runs_dir.glob("*/status.json"))

    def done(self) -> int:
        """The number of runs that are done."""
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
        """{run id: its records, without times}."""
        return {
            folder.name: [{**line, "seconds": None} for line in read_lines(folder / "records.jsonl")]
            for folder in self.folders()
        }


class Chaos:
    """Random faults, one at a time. `counts`: how often each fault has occurred, by its name."""

    def __init__(self, sweep: Sweep, seed: int) -> None:
        self.sweep, self.lab, self.random = sweep, sweep.lab, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.faults = {
            "preemption by a job of a higher partition": self.preempt,
            "requeue by hand": self.requeue,
            "scancel": self.cancel,
            "power failure of a node": self.power_off,
            "loss of a node whose jobs keep running": self.orphan,
            "SIGKILL of slurmctld": self.kill_controller,
            "SIGKILL of the launching process": self.kill_launcher,
        }

    def disturb(self, seconds: float) -> None:
        """Repeat all faults, in random order, each at least once, until the time is over or every run is done."""
        names = list(self.faults)
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.sweep.done() < self.sweep.runs:
            self.random.shuffle(names)
            for name in names:
                if self.faults[name]():
                    self.counts[name] += 1
                time.sleep(self.random.uniform(1, 5))

    # Each fault returns whether it has happened: there may be no task to disturb.

    def _running_task(self) -> str | None:
        running = [job for job, state in self.lab.states().items() if state == "RUNNING"]
        return self.random.choice(running) if running else None

    def preempt(self) -> bool:
        for _ in range(self.lab.nodes):
            self.lab.submit("--partition=high", "--exclusive", "--mem=0", script="sleep 3")
        return True

    def requeue(self) -> bool:
        if task := self._running_task():
            self.lab.run("scontrol", "requeue", task, check=False)
        return bool(task)

    def cancel(self) -> bool:
        if task := self._running_task():
            self.lab.run("scancel", task, check=False)
        return bool(task)

    def power_off(self) -> bool:
        return self._lose_node(self.lab.kill_node)

    def orphan(self) -> bool:
        return self._lose_node(self.lab.kill_slurmd_only)

    def _lose_node(self, kill) -> bool:
        node = self.random.randrange(1, self.lab.nodes + 1)
        kill(node, announced=True)
        time.sleep(self.random.uniform(1, 8))
        self.lab.return_node(node)
        return True

    def kill_controller(self) -> bool:
        self.lab.kill_controller()
        time.sleep(self.random.uniform(0, 4))
        self.lab.start_controller()
        return True

    def kill_launcher(self) -> bool:
        process = self.sweep.start()
        time.sleep(self.random.uniform(2, 12))
        killed = process.poll() is None
        process.kill()
        process.wait()
        return killed


def repeated_work(sweep: Sweep) -> dict[str, int]:
    """The cost of the faults: starts beyond a run's first, and steps that were done again (to within 5 steps)."""
    starts = steps = 0
    for folder in sweep.folders():
        starts += len(read_lines(folder / "environment.jsonl")) - 1
        reached = 0
        for resumed, step in re.findall(r"resuming at step (\d+)|step (\d+)/", (folder / "log.txt").read_text()):
            if resumed:
                steps += max(0, reached - int(resumed))
            reached = int(resumed or step)
    return {"starts": starts, "steps": steps}


def compare(undisturbed: Sweep, disturbed: Sweep) -> list[str]:
    """The differences between the two sweeps' results, in words; [] if there are none."""
    differences = [] if undisturbed.table() == disturbed.table() else ["the tables differ"]
    expected, actual = undisturbed.records(), disturbed.records()
    differences += [f"run {name}: other records" for name in expected if expected[name] != actual.get(name)]
    return differences + [f"run {name}: only in one sweep" for name in expected.keys() ^ actual.keys()]


def trial(lab: Lab, folder: Path, *, runs: int, steps: int, seconds: float, seed: int) -> tuple[list[str], list[str]]:
    """Run both sweeps. RuntimeError: one is not done after 20 minutes, counted from the end of the faults.

    Returns:
        Lines that report what happened, and the differences between the two sweeps' results.
    """
    undisturbed, disturbed = (Sweep(lab, folder / name, runs, steps) for name in ("undisturbed", "disturbed"))
    began = time.monotonic()
    undisturbed.finish(1200)
    undisturbed_seconds = time.monotonic() - began
    chaos = Chaos(disturbed, seed)
    began = time.monotonic()
    disturbed.start().wait()
    chaos.disturb(seconds)
    lab.clear()
    done_before = disturbed.done()
    disturbed.finish(1200)
    lines = [
        f"{runs} runs of {steps} steps, seed {seed}; undisturbed: {undisturbed_seconds:.0f} s; with faults: "
        f"{time.monotonic() - began:.0f} s",
        *(f"- {count} x {name}" for name, count in sorted(chaos.counts.items())),
        f"done when the faults ended: {done_before}; in the end: {disturbed.done()} of {disturbed.runs}; the command "
        f"was given {disturbed.launches} times",
    ]
    cost, total = repeated_work(disturbed), runs * steps
    lines.append(
        f"done again: {cost['steps']} of {total} steps ({cost['steps'] / total:.1%}); {cost['starts']} restarts"
    )
    return lines, compare(undisturbed, disturbed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=48, help="a multiple of 12")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=6, help="of faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    with temporary_lab(nodes=4) as lab, tempfile.TemporaryDirectory() as folder:
        size = {"runs": options.runs, "steps": options.steps}
        lines, differences = trial(lab, Path(folder), **size, seconds=60 * options.minutes, seed=options.seed)
    lines.append("\n".join(differences) or "records and tables equal to the undisturbed sweep's")
    text = "\n".join([time.strftime("%Y-%m-%d, ") + f"{platform.machine()}, {os.cpu_count()} cores", "", *lines])
    print(text)
    if options.out:
        options.out.write_text(f"# benchmarks/chaos_slurm.py\n\n    python {' '.join(sys.argv)}\n\n{text}\n")
    return bool(differences)


if __name__ == "__main__":
    sys.exit(main())
