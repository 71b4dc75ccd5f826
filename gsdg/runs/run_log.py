"""How a run ended, in its own folder: log.txt and status.json. What SLURM and Hydra say of it cannot be relied on."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from gsdg.owner import node_name
from gsdg.runs import LockLost, RunFolder
from gsdg.signals import Signals, Stopped

log = logging.getLogger(__name__)


class RunLog(logging.FileHandler):
    """log.txt, for as long as the run is ours: after a takeover it is another process's."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(folder.path / "log.txt")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(LockLost):
            self._folder.check_owner()
            super().emit(record)


@contextmanager
def logged_to(folder: RunFolder) -> Iterator[None]:
    """Everything logged inside also goes to the run's log.txt."""
    handler = RunLog(folder)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


@contextmanager
def outcome_recorded(folder: RunFolder, signals: Signals) -> Iterator[None]:
    """A failure or a stop inside is written to status and log before it goes on: SLURM and Hydra may swallow it."""
    try:
        yield
    except LockLost:
        raise
    except BaseException as error:
        signals.defer()  # what is written now is not to be torn by another
        stopped = asked_to_stop(error)
        reason = stopped or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        with suppress(LockLost, OSError):
            folder.set_status(state="stopped" if stopped else "failed", reason=reason)
        if stopped:
            log.info("stopped: %s", stopped)
            raise
        with suppress(LockLost, OSError), folder.writing(), (folder.path / "log.txt").open("a") as file:
            traceback.print_exc(file=file)
        raise


def asked_to_stop(error: BaseException) -> str:
    """`SIGUSR2 on n3: saved after 1200 of 5001 steps`; "" if it was not a signal that ended the run."""
    if isinstance(error, Stopped):
        return f"{error.signal.name} on {node_name()}: {error.said}"
    code = error.code if isinstance(error, SystemExit) else None
    if isinstance(error, KeyboardInterrupt) or (isinstance(code, int) and not 0 <= code < 128):
        return f"{type(error).__name__} on {node_name()}: obeyed at once, the run goes on from its last checkpoint"
    return ""
