"""What a task of the cluster does: one child process a run, one after another or some side by side. No torch here.

submitit pickles a `Pack` and calls it. When SLURM announces the end (USR2), submitit calls `checkpoint()` and puts the
task back into the queue: the children are asked to save and stop first. A child that dies takes nobody with it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from gsdg.environment import usable_cores, visible_cores
from gsdg.runs import Busy, LockLost, RunFolder
from gsdg.sweep.folder import Frozen, SweepFolder

log = logging.getLogger(__name__)
DONE, FAILED, BUSY, LOST, STOPPED = 0, 1, 3, 4, 75  # exit codes of a child (one.py)
UNPREPARED = {-signal.SIGUSR2, -signal.SIGTERM, -signal.SIGINT}  # of one that was asked before it could listen
LOOK_EVERY = 0.2  # seconds between looks at the children
CANCELLED_EVERY = 10.0  # seconds between looks at the sweep's events
LAST_WORDS = 5.0  # seconds: a child killed by SIGKILL may have been killed with all of us


class PackFailed(RuntimeError):
    """Some runs failed: SLURM then shows the task as FAILED too. Which, and why, is in the runs' own status."""


class TakenOver(RuntimeError):
    """The task was given to another node while this copy of it lived on: this copy stops."""


@dataclass
class Pack:
    """Some runs of a sweep for one task; `side_by_side` of them at once.

    grace: seconds between the signal and the end. environment: of the children; None takes a variable away.
    submission: this submission's name; with `afresh`, what a run left under another one is removed.
    """

    sweep: Path
    array: str
    submission: str
    runs: list[Frozen]
    side_by_side: int
    grace: float
    afresh: bool = False
    environment: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._children: dict[int, tuple[Frozen, subprocess.Popen]] = {}  # by slot
        self._failed: list[str] = []

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_children": {}, "_failed": []}

    # ---- submitit's two verbs -----------------------------------------------------------------------------------

    def __call__(self) -> None:
        """Do every run that is not done. PackFailed at the end if some failed; TakenOver as soon as that is seen."""
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("submitit").propagate = False  # it has its own way to stdout
        waiting, looked = list(self.runs), 0.0
        with self._children_waited_for():
            while waiting or self._children:
                if time.monotonic() - looked > CANCELLED_EVERY:
                    cancelled, looked = self._cancelled(), time.monotonic()
                    waiting = [run for run in waiting if run.run_id not in cancelled]
                    self._stop(cancelled)
                while waiting and len(self._children) < self.side_by_side:
                    self._start(waiting.pop(0))
                time.sleep(LOOK_EVERY)
                waiting += self._ended()
        if self._failed:
            raise PackFailed(f"{len(self._failed)} of {len(self.runs)} runs failed: {', '.join(self._failed)}")

    def checkpoint(self) -> object:
        """Called by submitit on USR2: have every child save and stop, then let submitit queue the task again."""
        import submitit

        began = time.monotonic()
        children = [child for _, child in self._children.values()]
        log.info("asked to stop: %d runs save and stop", len(children))
        _signal(children, signal.SIGUSR2)
        while any(child.poll() is None for child in children) and time.monotonic() - began < self.grace:
            time.sleep(LOOK_EVERY)
        _signal(children, signal.SIGKILL)  # those that took too long: their last checkpoint is what is left
        _wait_for_controller(self.grace - (time.monotonic() - began))
        return submitit.helpers.DelayedSubmission(self)

    # ---- children -------------------------------------------------------------------------------------------------

    def _start(self, run: Frozen) -> None:
        status = _folder(run).status
        again = self.afresh and status.get("submission") != self.submission
        again = again or run.config.get("on_code_change") == "rerun"  # the run itself looks whether its code changed
        if status.get("state") == "done" and not again:
            log.info("run %s is done", run.run_id)
            return
        slot = next(number for number in range(self.side_by_side) if number not in self._children)
        order = {"run_id": run.run_id, "config": {**run.config, "force": self.afresh}, "submission": self.submission}
        command = [sys.executable, str(Path(__file__).with_name("start.py")), "-m", "gsdg.sweep.one"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, env=self._child_environment(slot), text=True)
        self._children[slot] = run, child
        log.info("run %s starts as process %d: %s", run.run_id, child.pid, " ".join(run.overrides))
        with suppress(BrokenPipeError):  # it died at once: its exit code says so
            child.stdin.write(json.dumps(order))
            child.stdin.close()

    def _child_environment(self, slot: int) -> dict[str, str]:
        """One GPU for each of those side by side where there are several, and a share of the cores."""
        changed = {"PYTHONUNBUFFERED": "1", **self.environment}
        gpus = changed.get("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
        if gpus and self.side_by_side > 1:
            changed["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[slot % len(gpus.split(","))]
        threads = max(1, usable_cores(most=1000) // self.side_by_side)
        if threads < visible_cores():  # torch would start one for each core that it sees
            changed.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(threads)))
        return {key: value for key, value in {**os.environ, **changed}.items() if value is not None}

    def _ended(self) -> list[Frozen]:
        """Look after the children that have ended; returns the runs that are to be started again."""
        again = []
        for slot, (run, child) in list(self._children.items()):
            code = STOPPED if child.poll() in UNPREPARED else child.poll()
            if code is None:
                continue
            del self._children[slot]
            if code == LOST:
                raise TakenOver(f"run {run.run_id} goes on elsewhere: this copy of the task stops.")
            if code == STOPPED and run.run_id not in self._cancelled():
                again.append(run)  # the signal was not ours to obey: had submitit seen it, we would not be here
            elif code == BUSY:
                log.info("run %s is being written by another process: left to it", run.run_id)
            elif code not in (DONE, STOPPED) and _folder(run).status.get("state") != "done":
                self._failed.append(run.run_id)
                self._note_death(run, code)
        return again

    def _note_death(self, run: Frozen, code: int) -> None:
        """A child that could not say itself why it ended: write it into the run's status."""
        folder = _folder(run)
        if code == FAILED and has_told(folder.status, self.submission):
            return
        reason = f"its process ended with exit code {code}"
        if code < 0:
            reason = f"its process was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            time.sleep(LAST_WORDS)
            reason += ", as the kernel does when memory runs out"
        log.error("run %s: %s", run.run_id, reason)
        with suppress(Busy, LockLost), folder.hold(submission=self.submission):
            folder.set_status(state="failed", reason=reason)

    def _stop(self, run_ids: set[str]) -> None:
        _signal([child for run, child in self._children.values() if run.run_id in run_ids], signal.SIGUSR2)

    def _cancelled(self) -> set[str]:
        """The runs that were cancelled after this array was submitted."""
        cancelled: set[str] = set()
        with suppress(OSError):  # a network file system's bad moment: it is looked at again
            for event in SweepFolder(self.sweep).events():
                if event["event"] == "submitted" and event["array"] == self.array:
                    cancelled = set()
                elif event["event"] == "cancelled":
                    cancelled |= set(event["runs"])
        return cancelled

    @contextmanager
    def _children_waited_for(self) -> Iterator[None]:
        """However this process ends, its children have saved and stopped before it does."""
        try:
            yield
        except BaseException:
            children = [child for _, child in self._children.values()]
            _signal(children, signal.SIGUSR2)
            for child in children:
                child.wait()
            raise


def _signal(children: list[subprocess.Popen], number: signal.Signals) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def has_told(status: dict, submission: str) -> bool:
    """Whether a run's status says how this submission of it ended; what an earlier one said is old."""
    return status.get("state") == "done" or (status.get("state"), status.get("submission")) == ("failed", submission)


def _folder(run: Frozen) -> RunFolder:
    return RunFolder(Path(run.config["runs_dir"]) / run.run_id)


def _wait_for_controller(seconds: float) -> None:
    """slurmctld may be down for the moment; putting the task back into the queue needs it."""
    if "SLURM_JOB_ID" not in os.environ:
        return
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(subprocess.TimeoutExpired):
            answer = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=10)
            if " is UP" in answer.stdout:
                return
        time.sleep(1.0)
