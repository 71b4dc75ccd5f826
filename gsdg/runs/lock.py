"""The lock on a run's folder: one process at a time may write a run. Standard library only.

<run folder>/
    lock          JSON: the owner, {token, host, pid_namespace, pid, process_start, job, node, restart}
    .guard        locked by the kernel while a process compares the token in `lock` with its own token and then writes
    status.json   its `heartbeat` is renewed by the owner every HEARTBEAT_EVERY seconds

A process that is killed leaves `lock` behind. The next process finds that the owner is dead and takes the lock over. An
owner may also be taken for dead by mistake, such as after a network failure. So every write is fenced: inside
`RunLock.writing()`, which raises LockLost once another process has taken the lock over.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Generator
from pathlib import Path

from gsdg.runs.process_identity import describe_process, is_alive, is_visible, requeued_since, this_process
from gsdg.utils.errors import UserError
from gsdg.utils.file_locks import file_lock
from gsdg.utils.json_files import load_json, read_json, write_json

HEARTBEAT_EVERY = 15.0  # seconds
RETRY_EVERY = 1.0  # seconds between attempts to acquire the lock of an owner whose heartbeat may have stopped


class Busy(UserError):
    """Another live process holds the lock of this run."""


class LockLost(UserError):
    """Another process has taken over the lock of this run: this process must not write any more."""


class RunLock:
    """The lock on one run's folder, as one process uses it: `acquire`, then `renew` in a thread, then `release`.

    Args:
        folder: the run's folder. It must exist before `acquire`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._token = ""  # written into `lock` when this process acquires it; "" before that
        self._thread_lock = threading.RLock()  # heartbeats are written by a thread of their own
        self._guarded = False

    def acquire(self, begin: Callable[[dict], None], patience: float = 0.0) -> None:
        """Acquire the lock if no live process holds it, then call `begin` before another process can acquire it.

        A SLURM job that was requeued takes over from its own earlier start even if that start is still alive: SLURM has
        given it up together with its node.

        Args:
            begin: is called with the content of status.json, which the last owner has left; {} where there is none.
            patience: seconds to wait for an owner on another host (or in another container) to be found dead. The wait
                ends early if that owner sends a heartbeat.

        Raises:
            Busy: a live process holds the lock.
        """
        deadline = time.monotonic() + patience
        first_heartbeat = self._heartbeat()
        while not self._acquire_if_free(begin):
            # A live owner that is visible, or that has just sent a heartbeat, will not be found dead: no need to wait.
            owner, heartbeat = read_json(self.folder / "lock"), self._heartbeat()
            silent = not is_visible(owner) and heartbeat == first_heartbeat
            if owner and (not silent or time.monotonic() >= deadline):
                raise Busy(
                    f"run {self.folder.name} is being written by {describe_process(owner)}.\n"
                    f"Wait for it, stop it, or change the config. (Its folder: {self.folder})"
                )
            time.sleep(RETRY_EVERY)

    def renew(self, send_heartbeat: Callable[[], None], stop: threading.Event) -> None:
        """Call `send_heartbeat` every HEARTBEAT_EVERY seconds until `stop` is set: the target of a thread."""
        while not stop.wait(HEARTBEAT_EVERY):
            with contextlib.suppress(LockLost, OSError):  # the main thread meets the same error at its next write
                send_heartbeat()

    def release(self) -> None:
        """Remove `lock` if this process still holds it."""
        # A `lock` that cannot be removed stays as if this process had been killed: the next process takes it over.
        with contextlib.suppress(LockLost, OSError), self.writing():
            (self.folder / "lock").unlink()

    @contextlib.contextmanager
    def writing(self) -> Generator[None]:
        """While inside, no other process takes the lock over. LockLost if another process has done so before.

        It may be nested.
        """
        with self._guard():
            self.check_owner()
            yield

    def check_owner(self) -> None:
        """Raise LockLost if another process has taken the lock over since `acquire`."""
        owner = load_json(self.folder / "lock")
        if not self._token or owner.get("token") != self._token:
            by = describe_process(owner) if owner else "another process, or its folder was removed"
            raise LockLost(
                f"run {self.folder.name} was taken over by {by}.\n"
                f"This process, {describe_process(this_process())}, stops without writing any more. "
                f"(The run's folder: {self.folder})"
            )

    def _acquire_if_free(self, begin: Callable[[dict], None]) -> bool:
        """Make one attempt: whether this process holds the lock now."""
        with self._guard():
            # `lock` is read before the heartbeat, so that a new owner is never judged by the last owner's heartbeat.
            # An error while reading is raised: a status that the disk cannot read must not pass for that of a new run.
            owner, me = load_json(self.folder / "lock"), this_process()
            status = load_json(self.folder / "status.json")
            if owner and is_alive(owner, status.get("heartbeat")) and not requeued_since(owner, me):
                return False
            self._token = uuid.uuid4().hex
            write_json(self.folder / "lock", {"token": self._token, **me})
            begin(status)
            return True

    def _heartbeat(self) -> float | None:
        return read_json(self.folder / "status.json").get("heartbeat")

    @contextlib.contextmanager
    def _guard(self) -> Generator[None]:
        """While inside, no other process on this file system, and no other thread, is inside. It may be nested."""
        with self._thread_lock:
            if self._guarded:
                yield
                return
            with contextlib.ExitStack() as guard:
                try:
                    guard.enter_context(file_lock(self.folder / ".guard"))
                except FileNotFoundError:
                    raise LockLost(f"{self.folder} is gone: it was removed while the run was being written.") from None
                self._guarded = True
                try:
                    yield
                finally:
                    self._guarded = False
