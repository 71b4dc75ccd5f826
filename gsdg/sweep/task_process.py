"""What a cluster task executes: one child process per run, one after another or several side by side. No torch here.

submitit unpickles a `Pack` and calls it. When SLURM announces the end of the task (USR2), submitit calls
`checkpoint()`: the children save and stop, and submitit puts the task back into the queue. A child that dies does not
end the others.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from gsdg.runs.folder import RunFolder
from gsdg.runs.run_log import reason_of
from gsdg.sweep import failure
from gsdg.sweep.bootstrap import DAMAGED
from gsdg.sweep.folder import FrozenRun, SweepFolder
from gsdg.utils.machine import usable_cores, visible_cores

log = logging.getLogger(__name__)
DONE, FAILED, BUSY, TAKEN_OVER, STOPPED = 0, 1, 3, 4, 75  # exit codes of a child (run_one.py)
# Return codes of a child that received a signal to stop before it had installed its signal handlers.
SIGNALLED_TOO_EARLY = {-signal.SIGUSR2, -signal.SIGTERM, -signal.SIGINT}
POLL_EVERY = 0.2  # seconds between checks whether children have ended
CANCELLED_EVERY = 10.0  # seconds between reads of the sweep's events
BUSY_EVERY = 2.0  # seconds between checks of the runs that other processes write
AFTER_SIGKILL = 5.0  # seconds to wait before a killed child is called failed: SLURM may be killing the whole task


class PackFailed(RuntimeError):
    """Some runs failed, so SLURM must show the task as FAILED. The reasons are in the status files of the runs."""


class TakenOver(RuntimeError):
    """SLURM started the task on another node while this copy of it was still alive: this copy stops."""


@dataclass
class Pack:
    """The runs of one task.

    Args:
        sweep: the sweep's folder.
        array: name of the job array that the task belongs to.
        submission: name of the submission, which is noted in the status of every run.
        runs: the runs, in the order in which they are started.
        side_by_side: number of runs that are executed at the same time.
        grace: seconds between the signal that announces the end of the task, and the end.
        from_scratch: whether files that another submission left in the folder of a run are removed.
        environment: environment variables of the children; None removes a variable.
    """

    sweep: Path
    array: str
    submission: str
    runs: list[FrozenRun]
    side_by_side: int
    grace: float
    from_scratch: bool = False
    environment: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._children: dict[int, tuple[FrozenRun, subprocess.Popen]] = {}  # {slot: the run and its process}
        self._busy: list[FrozenRun] = []  # runs that other live processes write, and that this task waits for
        self._failed: list[str] = []

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_children": {}, "_busy": [], "_failed": []}

    # ---- called by submitit -------------------------------------------------------------------------------------

    def __call__(self) -> None:
        """Execute every run that is not done.

        Raises:
            PackFailed: at the end, if some runs failed.
            TakenOver: at once, if another copy of this task works on one of the runs.
        """
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("submitit").propagate = False  # submitit prints its own lines to stdout
        waiting, events_read, locks_checked = list(self.runs), 0.0, 0.0
        with self._children_stopped_on_error():
            while waiting or self._children or self._busy:
                # Cancelled runs are not started; those that are being executed are stopped.
                if time.monotonic() - events_read > CANCELLED_EVERY:
                    cancelled, events_read = self._cancelled_runs(), time.monotonic()
                    waiting = [run for run in waiting if run.run_id not in cancelled]
                    self._busy = [run for run in self._busy if run.run_id not in cancelled]
                    self._stop(cancelled)
                # Runs that another process has stopped writing can be started.
                if time.monotonic() - locks_checked > BUSY_EVERY:
                    waiting, locks_checked = waiting + self._released_runs(), time.monotonic()
                while waiting and len(self._children) < self.side_by_side:
                    self._try_to_start(waiting.pop(0))
                time.sleep(POLL_EVERY)
                # A run whose process was stopped by a signal that was not meant for it is started again.
                waiting += self._reap_children()
        if self._failed:
            raise PackFailed(f"{len(self._failed)} of {len(self.runs)} runs failed: {', '.join(self._failed)}")

    def checkpoint(self) -> object:
        """Called by submitit on USR2: let every child save and stop, then let submitit queue the task again."""
        import submitit

        began = time.monotonic()
        children = [child for _, child in self._children.values()]
        log.info("asked to stop: %d runs save and stop", len(children))
        _signal(children, signal.SIGUSR2)
        while any(child.poll() is None for child in children) and time.monotonic() - began < self.grace:
            time.sleep(POLL_EVERY)
        _signal(children, signal.SIGKILL)  # children that took too long resume from their last checkpoint
        _wait_for_controller(self.grace - (time.monotonic() - began))
        os.umask(os.umask(0o022) | 0o022)  # submitit pickles the task for its next start: only this user may write it
        return submitit.helpers.DelayedSubmission(self)

    # ---- starting a child ---------------------------------------------------------------------------------------

    def _try_to_start(self, run: FrozenRun) -> None:
        """Start the run. An OSError fails this run only."""
        try:
            self._start(run)
        except OSError as error:
            self._fail(run, reason_of(error))

    def _start(self, run: FrozenRun) -> None:
        status = _folder(run).status
        repeat = self.from_scratch and status.get("submission") != self.submission
        repeat = repeat or run.config.get("on_code_change") == "rerun"  # the child checks whether the code changed
        if status.get("state") == "done" and not repeat:
            log.info("run %s is done", run.run_id)
            return
        slot = next(number for number in range(self.side_by_side) if number not in self._children)
        request = {
            "run_id": run.run_id,
            "config": {**run.config, "force": self.from_scratch},
            "sweep": str(self.sweep),
            "submission": self.submission,
        }
        start = Path(__file__).with_name("bootstrap.py")
        command = [sys.executable, str(start), "-m", "gsdg.sweep.run_one", str(self.sweep)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, env=self._child_environment(slot), text=True)
        self._children[slot] = run, child
        log.info("run %s starts as process %d: %s", run.run_id, child.pid, " ".join(run.overrides))
        assert child.stdin is not None  # it is a pipe
        with suppress(BrokenPipeError):  # the child died at once; its exit code is handled by _reap_children
            child.stdin.write(json.dumps(request))
            child.stdin.close()

    def _child_environment(self, slot: int) -> dict[str, str]:
        """The environment of a child: where runs are side by side, one GPU of several and a share of the cores."""
        changed = {"PYTHONUNBUFFERED": "1", **self.environment}
        gpus = changed.get("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
        if gpus and self.side_by_side > 1:
            changed["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[slot % len(gpus.split(","))]
        threads = max(1, usable_cores(most=1000) // self.side_by_side)
        if threads < visible_cores():  # torch would start one thread per visible core
            changed.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(threads)))
        return {key: value for key, value in {**os.environ, **changed}.items() if value is not None}

    # ---- after a child has ended --------------------------------------------------------------------------------

    def _reap_children(self) -> list[FrozenRun]:
        """Handle the children that have ended; the runs that must be started again."""
        to_restart = []
        for slot, (run, child) in list(self._children.items()):
            code = STOPPED if child.poll() in SIGNALLED_TOO_EARLY else child.poll()
            if code is None:
                continue
            del self._children[slot]
            if code == TAKEN_OVER:
                raise TakenOver(f"run {run.run_id} goes on elsewhere: this copy of the task stops.")
            if code == STOPPED and run.run_id not in self._cancelled_runs():
                # The signal did not announce the end of the task: submitit would be in checkpoint(), not here.
                to_restart.append(run)
            elif code == BUSY:
                log.info("run %s: this task waits until that process ends, then it goes on with the run", run.run_id)
                self._busy.append(run)
            elif code not in (DONE, STOPPED) and _folder(run).status.get("state") != "done":
                self._record_failure(run, code)
        return to_restart

    def _released_runs(self) -> list[FrozenRun]:
        """The busy runs that no other process writes any more; they are removed from the busy runs."""
        released = [run for run in self._busy if not _folder(run).is_live()]
        self._busy = [run for run in self._busy if run not in released]
        return released

    def _record_failure(self, run: FrozenRun, code: int) -> None:
        """Count the run as failed. Write the reason if the child could not; `code` is its return code."""
        if code == FAILED and failure.is_recorded(_folder(run), self.sweep, self.submission):
            self._failed.append(run.run_id)
            return
        reason = f"its process ended with exit code {code}"
        if code == DAMAGED:
            retry = ["python", "-m", "gsdg.sweep", "retry", self.sweep.name, "--runs-dir", str(self.sweep.parents[1])]
            reason = f"the copy of the code that it was submitted with is damaged; made again by: {shlex.join(retry)}"
        if code < 0:
            reason = f"its process was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            time.sleep(AFTER_SIGKILL)
            reason += ", as the kernel does when memory runs out"
        self._fail(run, reason)

    def _fail(self, run: FrozenRun, reason: str) -> None:
        log.error("run %s: %s", run.run_id, reason)
        self._failed.append(run.run_id)
        failure.record(_folder(run), self.sweep, self.submission, reason, _stdout_line())

    # ---- cancellation -------------------------------------------------------------------------------------------

    def _stop(self, run_ids: set[str]) -> None:
        _signal([child for run, child in self._children.values() if run.run_id in run_ids], signal.SIGUSR2)

    def _cancelled_runs(self) -> set[str]:
        """The ids of the runs that were cancelled after this array was submitted, by the order of the events."""
        cancelled: set[str] = set()
        with suppress(OSError):  # a network file system may fail for a moment: the events are read again later
            for event in SweepFolder(self.sweep).events():
                if event["event"] == "submitted" and event["array"] == self.array:
                    cancelled = set()
                elif event["event"] == "cancelled":
                    cancelled |= set(event["runs"])
        return cancelled

    @contextmanager
    def _children_stopped_on_error(self) -> Generator[None]:
        """If an exception ends this process, its children save and stop first."""
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


def _stdout_line() -> str:
    """A line that names the file which this task and its runs print to; "" where stdout is not a file."""
    with suppress(OSError):
        if (file := os.readlink("/proc/self/fd/1")).startswith("/") and os.path.isfile(file):
            return f"What its process printed is in {file}\n"
    return ""


def _folder(run: FrozenRun) -> RunFolder:
    return RunFolder(Path(run.config["runs_dir"]) / run.run_id)


def _wait_for_controller(seconds: float) -> None:
    """Wait until slurmctld answers, which is needed to queue the task again; at most `seconds`."""
    if "SLURM_JOB_ID" not in os.environ:
        return
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(subprocess.TimeoutExpired):
            answer = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=10)
            if " is UP" in answer.stdout:
                return
        time.sleep(1.0)
