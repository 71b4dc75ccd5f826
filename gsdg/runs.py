"""A run on disk: its identity, its folder, who owns it, how it stands, what it recorded. Standard library only.

<runs_dir>/<run_id>/
    config.json         the resolved config
    status.json         {state: running | done | failed, step, steps, reason, heartbeat, host, pid, started}
    records.jsonl       append-only, one evaluation a line (see `RunFolder.append_record`)
    diagnostics.jsonl   append-only, one logged step a line, where the algorithm has diagnostics switched on
    environment.jsonl   one line a start: versions, commit, host, device
    log.txt             everything logged, tracebacks included
    lock                who writes here
    checkpoints/        the last two; gone when the run is done
    model.pt            the final weights
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from gsdg.errors import UserError

STALE_AFTER = 120.0  # seconds without a heartbeat after which a process on another host counts as dead
HEARTBEAT_EVERY = 15.0  # seconds

# What may differ between two executions of the same experiment.
NOT_SCIENTIFIC = (
    "data_dir",
    "runs_dir",
    "device",
    "force",
    "dataset.cache",
    "trainer.checkpoint_every",
    "trainer.log_every",
    "trainer.workers",
    "trainer.keep_weights",
    "algorithm.diagnostics",
)


class LockLost(RuntimeError):
    """Another process has taken this run over: this one must not write any more."""


def scientific(config: dict) -> dict:
    """The config without what cannot change a result: folders, device, logging, workers."""
    config = copy.deepcopy(config)
    for key in NOT_SCIENTIFIC:
        *parents, leaf = key.split(".")
        node = config
        for parent in parents:
            node = node.get(parent, {})
        node.pop(leaf, None)
    return config


def run_id(config: dict) -> str:
    """Twelve hex digits: the hash of the scientific config. The same experiment has the same folder everywhere."""
    text = json.dumps(scientific(config), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def write_json(path: Path, value: object) -> None:
    """Replace `path` in one step: a reader sees the old text or the new, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
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


def process_start(pid: int) -> str | None:
    """When process `pid` started, in the kernel's ticks; "" where the system does not tell; None if it is dead."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


class RunFolder:
    """One run's folder. Reading needs nothing; writing needs `hold()`, which one process at a time may have."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._token = ""
        self._status: dict = {}
        self._writing = threading.Lock()

    # ---- status -----------------------------------------------------------------------------------------------

    @property
    def status(self) -> dict:
        return read_json(self.path / "status.json")

    def set_status(self, **changes: object) -> None:
        """Write the status now, with a fresh heartbeat."""
        with self._writing:
            self.check_owner()
            self._status.update(changes, heartbeat=time.time())
            write_json(self.path / "status.json", self._status)

    def progress(self, step: int) -> None:
        """Note how many steps are done; the next heartbeat writes it."""
        self._status["step"] = step

    # ---- records ----------------------------------------------------------------------------------------------

    def append_record(self, record: dict) -> None:
        """Append {step, accuracy: {domain: {part: fraction}}, metrics: {name: mean since the last}, seconds}."""
        self.check_owner()
        append_line(self.path / "records.jsonl", record)

    def append_diagnosis(self, diagnosis: dict) -> None:
        """Append {step, ...}, whatever the algorithm has to say of that step."""
        self.check_owner()
        append_line(self.path / "diagnostics.jsonl", diagnosis)

    def records(self) -> list[dict]:
        """Every whole line of the records; a truncated one is skipped."""
        return read_lines(self.path / "records.jsonl")

    def keep_lines_before(self, step: int) -> None:
        """Drop what a killed run recorded after its last checkpoint: the resumed run will record it again."""
        self.check_owner()
        for name in ("records.jsonl", "diagnostics.jsonl"):
            lines = read_lines(self.path / name)
            if lines:
                temporary = self.path / f".{name}"
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] < step))
                os.replace(temporary, self.path / name)

    # ---- ownership --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def hold(self, *, afresh: bool = False) -> Iterator[None]:
        """Own the folder: refuse if a live process does, take over from a dead one, beat while inside.

        `afresh` removes what earlier starts left. UserError if a live process owns the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if afresh:
            self._clear()
        self.set_status(state="running", reason=None)
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(stop,), daemon=True)
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()
            self._release()

    def check_owner(self) -> None:
        """Fencing: raise LockLost if another process has taken over since `hold()`."""
        if read_json(self.path / "lock").get("token") != self._token:
            raise LockLost(f"{self.path} was taken over by another process; this one stops without writing.")

    def _clear(self) -> None:
        self._status = {key: self._status[key] for key in ("host", "pid", "started")}
        for entry in self.path.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Between reading the lock and writing it nobody else on this file system may do the same."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _take_lock(self) -> None:
        with self._guard():
            owner = read_json(self.path / "lock")
            if owner and self._alive(owner):
                raise UserError(
                    f"run {self.path.name} is being written by process {owner['pid']} on {owner['host']}.\n"
                    f"Wait for it, stop it, or change the config. (Its folder: {self.path})"
                )
            self._token = uuid.uuid4().hex
            host, pid = socket.gethostname(), os.getpid()
            write_json(
                self.path / "lock",
                {"token": self._token, "host": host, "pid": pid, "process_start": process_start(pid)},
            )
            self._status = {**self.status, "host": host, "pid": pid, "started": time.time()}

    def _alive(self, owner: dict) -> bool:
        if owner["host"] == socket.gethostname():
            started = process_start(owner["pid"])
            return started is not None and started == owner["process_start"]
        return time.time() - self.status.get("heartbeat", 0.0) < STALE_AFTER

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT_EVERY):
            with contextlib.suppress(LockLost, OSError):  # the writer in the main thread is the one to stop
                self.set_status()

    def _release(self) -> None:
        with contextlib.suppress(LockLost):
            self.check_owner()
            (self.path / "lock").unlink()
