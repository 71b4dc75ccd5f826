"""A run on disk: its folder, its lock, its status and its records. Standard library only.

<runs_dir>/<run_id>/
    config.json         the resolved config
    identity.json       {version, config: the part of it that the run id hashes, data, weights: digests}
    status.json         {state: running | done | failed | stopped, step, steps, reason, heartbeat, started, submission,
                        host, pid_namespace, pid, process_start, job, node}; stopped: it saved a checkpoint, and resumes
                        when it is started again; removing: true while force=true removes the files of earlier starts
    records.jsonl       append-only, one evaluation per line (see `RunFolder.append_record`)
    averaged.jsonl      the same for averaged weights, if weight averaging is on (gsdg/averaging)
    diagnostics.jsonl   append-only, one logged step per line, if the algorithm's diagnostics are on
    environment.jsonl   one line per start: versions, commit, fingerprints of the code, host, device
    loggers.json        {logger and destination: id of the run there}; metrics.csv, tensorboard/, wandb/: its loggers
    log.txt             everything logged, tracebacks included
    lock, .guard        which process may write here (see lock.py)
    checkpoints/        the last two, and those found damaged; removed when the run is done
    weights.json        which weights are kept, and of which step (see kept_weights.py)
    weights/            those of the selected step, or of every evaluation
    model.pt            those of the last step; model_averaged.pt their average
    state.pt            what a longer run starts from, with trainer.keep_state; extends.json names the run that a longer
                        one was made of (gsdg/extend.py)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Generator
from pathlib import Path

from gsdg.runs.disk import os_errors_named
from gsdg.runs.lines import keep_lines_before
from gsdg.runs.lock import Busy as Busy  # whoever reads runs imports from here alone
from gsdg.runs.lock import LockLost as LockLost
from gsdg.runs.lock import RunLock
from gsdg.runs.process_identity import STALE_AFTER as STALE_AFTER
from gsdg.runs.process_identity import is_alive, this_process
from gsdg.runs.process_identity import process_start as process_start
from gsdg.utils.json_files import append_line, flush_folder, read_json, read_lines, write_json

EVALUATION_FILES = ("records.jsonl", "averaged.jsonl")
LINE_FILES = (*EVALUATION_FILES, "diagnostics.jsonl")
OWNER_IN_STATUS = ("host", "pid_namespace", "pid", "process_start", "job", "node")  # fields of `this_process`
KEPT_FROM_SCRATCH = ("lock", ".guard", "status.json")  # files of the process that removes those of earlier starts


class RunFolder:
    """One run's folder. Anyone may read it; only the process that is inside `acquire()` may write.

    Args:
        path: `<runs_dir>/<run_id>`; `acquire()` creates it if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.lock = RunLock(self.path)
        self._status: dict = {}

    # ---- status -----------------------------------------------------------------------------------------------

    @property
    def status(self) -> dict:
        """The content of status.json; {} where there is none."""
        return read_json(self.path / "status.json")

    def is_live(self, status: dict | None = None) -> bool:
        """Whether a live process works on this run.

        A process on this host is looked up by its pid. For a process on another host, or in another container, the
        heartbeat must be newer than STALE_AFTER.

        Args:
            status: the content of status.json, if the caller has read it already.
        """
        status = self.status if status is None else status
        return status.get("state") == "running" and is_alive(status, status.get("heartbeat"))

    def set_status(self, **changes: object) -> None:
        """Write status.json with these changes and a new heartbeat."""
        with self.writing():
            self._status.update(changes, heartbeat=time.time())
            write_json(self.path / "status.json", dict(self._status), flush="state" in changes)

    def progress(self, step: int) -> None:
        """Set the number of finished steps, which the next heartbeat writes."""
        self._status["step"] = step

    # ---- records and other files ------------------------------------------------------------------------------

    def append_record(self, record: dict) -> None:
        """Append {step, accuracy: {domain: {part: fraction}}, metrics: {name: mean since the last record}, seconds}.

        With further metrics in trainer.metrics also scores: {metric: {domain: {part: value}}}.
        """
        self.append("records.jsonl", record)

    def append_averaged(self, record: dict) -> None:
        """Append {step, accuracy, averaging: its name, start, end: steps of the first and last weights, n, seconds}.

        With further metrics also scores, as in `append_record`.
        """
        self.append("averaged.jsonl", record)

    def append_diagnosis(self, diagnosis: dict) -> None:
        """Append {step, ...}: the algorithm's diagnostics of one step."""
        self.append("diagnostics.jsonl", diagnosis)

    def append(self, name: str, value: dict) -> None:
        """Append one JSON line to the file `name`."""
        with self.writing():
            append_line(self.path / name, value)

    def write(self, name: str, value: object) -> None:
        """Replace the JSON file `name`."""
        with self.writing():
            write_json(self.path / name, value, flush=True)

    def records(self) -> list[dict]:
        """Every complete line of records.jsonl; a truncated line is skipped."""
        return read_lines(self.path / "records.jsonl")

    def flush_lines(self) -> None:
        """Flush the appended lines to the disk, before a checkpoint of a later step is written.

        After a power failure the checkpoint would otherwise be there without the records before it.
        """
        for name in LINE_FILES:
            path = self.path / name
            with os_errors_named(path), contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                os.fsync(file.fileno())
        with os_errors_named(self.path), contextlib.suppress(FileNotFoundError):
            flush_folder(self.path)

    def keep_lines_before(self, step: int, *, recorded: bool = True) -> None:
        """Remove the lines of `step` and later steps: the run is resumed from `step` and will append them again.

        Lines that hold no record are removed too, with a warning.

        Args:
            recorded: whether step `step - 1` had been evaluated and recorded when the checkpoint was saved. If not, it
                will be evaluated again after the resume, and its record is removed too.
        """
        with self.writing():
            for name in LINE_FILES:
                first_removed = step - 1 if name in EVALUATION_FILES and not recorded else step
                keep_lines_before(self.path / name, first_removed)

    # ---- the lock ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def acquire(self, *, from_scratch: bool = False, patience: float = 0.0, **fields: object) -> Generator[None]:
        """While inside, hold the lock of the run and send heartbeats; status.json says that the run is running.

        The lock of a dead process is taken over. A run that is done stays done, unless `from_scratch`.

        Args:
            from_scratch: whether to remove the files of earlier starts.
            patience: seconds to wait for an owner on another host to be found dead (see `RunLock.acquire`).
            fields: further fields of status.json.

        Raises:
            Busy: a live process holds the lock.
            NotWritten: the file system refuses to write.
        """
        with os_errors_named(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        stop = threading.Event()
        heartbeats = threading.Thread(target=self.lock.renew, args=(self.set_status, stop), daemon=True)
        try:
            with os_errors_named(self.path):
                self.lock.acquire(lambda status: self._begin(status, from_scratch, fields), patience)
            heartbeats.start()
            yield
        finally:
            stop.set()
            if heartbeats.ident:
                heartbeats.join()
            self.lock.release()

    @contextlib.contextmanager
    def writing(self) -> Generator[None]:
        """Everything written to the folder is written inside: meanwhile no other process takes the lock over.

        Raises:
            LockLost: another process has taken the lock over.
            NotWritten: an OSError inside.
        """
        with os_errors_named(self.path), self.lock.writing():
            yield

    def _begin(self, status: dict, from_scratch: bool, fields: dict) -> None:
        """Make the folder that of this process. status: what the last owner left in status.json."""
        from_scratch = from_scratch or bool(status.get("removing"))
        self._status = {} if from_scratch else status
        if self._status.get("state") != "done":
            me = this_process()
            owner = {key: me[key] for key in OWNER_IN_STATUS}
            # "removing" is written before the first file is removed: a run without some of its files is never "done".
            removing = {"removing": True} if from_scratch else {}
            self.set_status(state="running", reason=None, started=time.time(), **owner, **fields, **removing)
        self._remove_leftovers()
        if from_scratch:
            self._remove_earlier_start()

    def _remove_earlier_start(self) -> None:
        """Remove everything that this process has not written. If it is killed meanwhile, the next start continues."""
        for entry in self.path.iterdir():
            if entry.name not in KEPT_FROM_SCRATCH:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        del self._status["removing"]
        self.set_status(state="running")

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of processes that were killed while they wrote."""
        for entry in [*self.path.glob(".*"), *self.path.glob("*/.*")]:
            if entry.name != ".guard":
                with contextlib.suppress(OSError):  # on NFS, a file that another process has open cannot be removed
                    entry.unlink()
