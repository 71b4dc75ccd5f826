"""A run on disk: its folder, who owns it, how it stands, what it recorded. Standard library only.

<runs_dir>/<run_id>/
    config.json         the resolved config
    identity.json       {version, config: what of it the run id is a hash of, data, weights: digests} (see identity.py)
    status.json         {state: running | done | failed | stopped, step, steps, reason, heartbeat, started, submission,
                        host, pid, process_start, job, node}; stopped: it saved itself, started again it goes on
    records.jsonl       append-only, one evaluation a line (see `RunFolder.append_record`)
    averaged.jsonl      the same of averaged weights, where there are such (trainer/averaging)
    diagnostics.jsonl   append-only, one logged step a line, where the algorithm has diagnostics switched on
    environment.jsonl   one line a start: versions, commit, fingerprints of the code, host, device
    log.txt             everything logged, tracebacks included
    lock                who writes here: {token, host, pid, process_start, job, node, restart}
    .guard              locked by whoever writes, so that nobody takes the run over in the middle of it
    checkpoints/        the last two; gone when the run is done
    model.pt            the final weights; model_averaged.pt their average
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from gsdg.owner import STALE_AFTER as STALE_AFTER  # readers of runs need no other module
from gsdg.owner import Busy, LockLost, alive, described, kernel_lock, requeued_since, this_process
from gsdg.owner import process_start as process_start

HEARTBEAT_EVERY = 15.0  # seconds
LOOK_EVERY = 1.0  # seconds, for a sign of life of a silent owner
OF_EVALUATIONS = ("records.jsonl", "averaged.jsonl")
LINES = (*OF_EVALUATIONS, "diagnostics.jsonl")
IN_STATUS = ("host", "pid", "process_start", "job", "node")  # of the process that works on it


def write_json(path: Path, value: object, *, flush: bool = False) -> None:
    """Replace `path` in one step: a reader sees the old text or the new, never half. `flush`: even if power fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with temporary.open("w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        if flush:
            os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    """The object in `path`, or {} where there is none or it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def append_line(path: Path, value: dict) -> None:
    """Add one JSON line in one write, so that a kill leaves at most one truncated line, the last."""
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(value) + "\n").encode())


def read_lines(path: Path) -> list[dict]:
    """Every whole line of a file of JSON lines; [] where there is none, a truncated line is skipped."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


class RunFolder:
    """One run's folder. Reading needs nothing; writing needs `hold()`, which one process at a time may have."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._token = ""
        self._status: dict = {}
        self._one_thread = threading.RLock()  # the heart beats in a thread of its own
        self._guarded = False

    # ---- status -----------------------------------------------------------------------------------------------

    @property
    def status(self) -> dict:
        return read_json(self.path / "status.json")

    def is_live(self, status: dict | None = None) -> bool:
        """Whether a process works on this run now. `status`: what has been read of it already, to spare the reading.

        On this host the process itself is looked for; on another one its heart must have beaten within STALE_AFTER.
        """
        status = self.status if status is None else status
        return status.get("state") == "running" and alive(status, status.get("heartbeat"))

    def set_status(self, **changes: object) -> None:
        """Write the status now, with a fresh heartbeat."""
        with self.writing():
            self._status.update(changes, heartbeat=time.time())
            write_json(self.path / "status.json", dict(self._status), flush="state" in changes)

    def progress(self, step: int) -> None:
        """Note how many steps are done; the next heartbeat writes it."""
        self._status["step"] = step

    # ---- what is written --------------------------------------------------------------------------------------

    def append_record(self, record: dict) -> None:
        """Append {step, accuracy: {domain: {part: fraction}}, metrics: {name: mean since the last}, seconds}."""
        self.append("records.jsonl", record)

    def append_averaged(self, record: dict) -> None:
        """Append {step, accuracy, averaging: its name, start, end: steps of the first and last weights, n, seconds}."""
        self.append("averaged.jsonl", record)

    def append_diagnosis(self, diagnosis: dict) -> None:
        """Append {step, ...}, whatever the algorithm has to say of that step."""
        self.append("diagnostics.jsonl", diagnosis)

    def append(self, name: str, value: dict) -> None:
        """Append one line to the file `name`."""
        with self.writing():
            append_line(self.path / name, value)

    def write(self, name: str, value: object) -> None:
        """Replace the JSON file `name`."""
        with self.writing():
            write_json(self.path / name, value)

    def records(self) -> list[dict]:
        """Every whole line of the records; a truncated one is skipped."""
        return read_lines(self.path / "records.jsonl")

    def flush_lines(self) -> None:
        """Put on the disk what was appended: a checkpoint that comes after it must not outlive it."""
        for name in LINES:
            with contextlib.suppress(FileNotFoundError), (self.path / name).open("rb") as file:
                os.fsync(file.fileno())

    def keep_lines_before(self, step: int, *, recorded: bool = True) -> None:
        """Drop what a killed run recorded after its last checkpoint: the resumed run will record it again.

        Not `recorded`: the checkpoint was saved before the record of the step before it was made.
        """
        with self.writing():
            for name in LINES:
                first = step - 1 if name in OF_EVALUATIONS and not recorded else step
                lines = read_lines(self.path / name)
                if lines:
                    temporary = self.path / f".{name}"
                    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] < first))
                    os.replace(temporary, self.path / name)

    # ---- ownership --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def hold(self, *, afresh: bool = False, patience: float = 0.0, **facts: object) -> Iterator[None]:
        """Own the folder: refuse if a live process does, take over from a dead one, beat while inside.

        `afresh` removes what earlier starts left; without it a run that is done stays done. `facts` go into the status.
        Busy if a live process owns it. One on another host that may have died just now is watched for `patience`
        seconds. A SLURM job that was requeued takes over from its own earlier start even if that lives on: SLURM has
        given it up with its node.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(stop,), daemon=True)
        try:
            self._take(time.monotonic() + patience, afresh, facts)
            beat.start()
            yield
        finally:
            stop.set()
            if beat.ident:
                beat.join()
            self._release()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Fencing: whatever is written is written inside, where nobody takes over. LockLost if somebody has before."""
        with self._guard():
            self.check_owner()
            yield

    def check_owner(self) -> None:
        """LockLost if another process has taken over since `hold()`."""
        owner = read_json(self.path / "lock")
        if not self._token or owner.get("token") != self._token:
            by = described(owner) if owner else "another process, or its folder was removed"
            raise LockLost(
                f"run {self.path.name} was taken over by {by}.\n"
                f"This one, {described(this_process())}, stops without writing any more. (Its folder: {self.path})"
            )

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Between reading the lock and writing, nobody else on this file system may do the same. It nests."""
        with self._one_thread:
            if self._guarded:
                yield
                return
            with kernel_lock(self.path / ".guard"):
                self._guarded = True
                try:
                    yield
                finally:
                    self._guarded = False

    def _take(self, deadline: float, afresh: bool, facts: dict) -> None:
        first_beat = self.status.get("heartbeat")
        while not self._take_if_free(afresh, facts):
            owner, now = read_json(self.path / "lock"), self.status.get("heartbeat")
            silent = owner.get("host") != this_process()["host"] and now == first_beat
            if owner and (not silent or time.monotonic() >= deadline):
                raise Busy(
                    f"run {self.path.name} is being written by {described(owner)}.\n"
                    f"Wait for it, stop it, or change the config. (Its folder: {self.path})"
                )
            time.sleep(LOOK_EVERY)

    def _take_if_free(self, afresh: bool, facts: dict) -> bool:
        with self._guard():
            owner, me, status = read_json(self.path / "lock"), this_process(), self.status
            if owner and alive(owner, status.get("heartbeat")) and not requeued_since(owner, me):
                return False
            self._token = uuid.uuid4().hex
            write_json(self.path / "lock", {"token": self._token, **me})
            self._sweep_out(everything=afresh)
            self._status = {} if afresh else status
            if self._status.get("state") != "done":
                worker = {key: me[key] for key in IN_STATUS}
                self.set_status(state="running", reason=None, started=time.time(), **worker, **facts)
            return True

    def _sweep_out(self, *, everything: bool) -> None:
        """Remove what killed processes were in the middle of writing; or everything."""
        if everything:
            for entry in self.path.iterdir():
                if entry.name not in ("lock", ".guard"):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for entry in [*self.path.glob(".*"), *self.path.glob("checkpoints/.*")]:
            if entry.name != ".guard":
                with contextlib.suppress(OSError):  # what an orphan on NFS still has open cannot be removed
                    entry.unlink()

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT_EVERY):
            with contextlib.suppress(LockLost, OSError):  # the writer in the main thread is the one to stop
                self.set_status()

    def _release(self) -> None:
        with contextlib.suppress(LockLost), self.writing():
            (self.path / "lock").unlink()
