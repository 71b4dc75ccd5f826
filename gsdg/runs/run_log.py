"""The log of a run and how it ended, written to its own folder: log.txt and status.json.

SLURM and Hydra cannot be relied on for this: they may lose the end of a log or swallow an exception.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress

from gsdg.runs.disk import os_errors_named
from gsdg.runs.folder import LockLost, RunFolder
from gsdg.runs.process_identity import node_name
from gsdg.utils.stop_signals import Signals, Stopped, StopRun

log = logging.getLogger(__name__)


class RunLog(logging.FileHandler):
    """Writes log.txt while this process holds the run's folder; after a takeover another process writes it."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(folder.path / "log.txt", encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._folder, self._refused = folder, False

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(LockLost, OSError):  # if the lock cannot be read, the run's next write raises
            self._folder.lock.check_owner()
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Report a full disk once; logging itself would print a traceback for every line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._refused:
            self._refused = True
            print(f"warning: lines are missing from {self.baseFilename}: {error.strerror or error}", file=sys.stderr)

    def close(self) -> None:
        """Close without raising: `handleError` has reported a full disk; an error here would hide how the run ended."""
        with suppress(OSError):
            super().close()


@contextmanager
def logged_to(folder: RunFolder) -> Generator[None]:
    """Everything that is logged inside also goes to the run's log.txt."""
    with os_errors_named(folder.path):
        handler = RunLog(folder)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


@contextmanager
def outcome_recorded(folder: RunFolder, signals: Signals) -> Generator[None]:
    """Write a failure or a stop that happens inside to status.json and log.txt, then let the exception pass.

    Nothing is written after LockLost, because the folder belongs to another process then.
    """
    try:
        yield
    except LockLost:
        raise
    except BaseException as error:
        signals.defer()  # another signal must not interrupt what is written now
        stopped = stop_reason(error)
        reason = stopped or reason_of(error)
        with suppress(LockLost):
            _set_final_status(folder, state="stopped" if stopped else "failed", reason=reason)
        if stopped:
            log.info("stopped: %s", stopped)
            raise
        with (
            suppress(LockLost, OSError),
            folder.writing(),
            # Names in a traceback may not be valid UTF-8.
            (folder.path / "log.txt").open("a", encoding="utf-8", errors="backslashreplace") as file,
        ):
            traceback.print_exc(file=file)
        raise


def _set_final_status(folder: RunFolder, **status: object) -> None:
    try:
        folder.set_status(**status)
    except OSError as error:  # such as the full disk that ended the run
        log.warning("%s could not be written, it still says running: %s", folder.path / "status.json", error)


def reason_of(error: BaseException) -> str:
    """`ValueError: first line of its message`; for an import error also the second line, which names the cause."""
    caused_by_import = isinstance(error, ImportError) or "Error loading" in str(error) or "Error locating" in str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {' '.join(lines[: 2 if caused_by_import else 1])}"


def stop_reason(error: BaseException) -> str:
    """`SIGUSR2 on n3: saved after 1200 of 5001 steps`, or what a callback said; "" if the run failed."""
    if isinstance(error, StopRun):
        return str(error)
    if isinstance(error, Stopped):
        return f"{error.signal.name} on {node_name()}: {error.message}"
    code = error.code if isinstance(error, SystemExit) else None
    if isinstance(error, KeyboardInterrupt) or (isinstance(code, int) and not 0 <= code < 128):
        return f"{type(error).__name__} on {node_name()}: stopped at once, the run resumes from its last checkpoint"
    return ""
