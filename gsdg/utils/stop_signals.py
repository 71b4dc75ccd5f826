"""Signals are noted when they come and obeyed between two steps, where a run can save itself. Standard library only.

Until `defer()` a signal to stop is obeyed at once: while data is read and weights are loaded nothing can be saved.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
NOTHING_SAVED = "stopped before it could make a step, nothing had to be saved"


class Stopped(BaseException):
    """A run stops because a signal asked; `said` tells what was saved."""

    def __init__(self, number: int, said: str = NOTHING_SAVED) -> None:
        super().__init__(number, said)
        self.signal, self.said = signal.Signals(number), said

    def __str__(self) -> str:
        return f"{self.signal.name}: {self.said}"


def end(number: int) -> NoReturn:
    """End the program as the signal would have ended it: KeyboardInterrupt, or SystemExit(128 + number)."""
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


class Signals:
    """Inside `with`, a signal of `stop` asks to save and stop, one of `save` to save and go on.

    Only signals that are handled by default are taken: an ignored one stays ignored (background jobs), one that another
    library handles is left to it (submitit); outside the main thread none is taken. A second SIGINT is obeyed at once.
    Processes forked inside, such as loaders of images, do not hear them: SLURM signals a whole tree of processes.
    """

    _inside: Signals | None = None  # what the processes forked now must not hear

    def __init__(self, stop: Sequence[int] = STOP, save: Sequence[int] = ()) -> None:
        self.stop: signal.Signals | None = None  # the first that asked to stop
        self._to_stop, self._to_save = frozenset(stop), frozenset(save) - frozenset(stop)
        self._deferred = self._save = self._interrupted = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._outer, Signals._inside = Signals._inside, self
            self._children = set(multiprocessing.active_children())
            for number in self._to_stop | self._to_save:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in list(self._previous):
                signal.signal(number, self._previous.pop(number))
            for child in set(multiprocessing.active_children()) - self._children:
                child.kill()  # it would not hear the SIGTERM with which Python ends a forgotten child, and waits for it
            Signals._inside = self._outer

    def defer(self) -> None:
        """From now on a signal is only noted."""
        self._deferred = True

    def take_save(self) -> bool:
        """Whether a signal, of either kind, has come since the last call."""
        asked, self._save = self._save, False
        return asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._save = True
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        if number in self._to_stop:
            self.stop = self.stop or signal.Signals(number)
            if not self._deferred:
                self._deferred = True  # obeyed once: what is written of it is not to be torn by another
                raise Stopped(number)
        self._say(number)

    def _say(self, number: int) -> None:
        """Not by logging: the signal may have come in the middle of a line of it."""
        more = " (again to stop at once)" if number == signal.SIGINT else ""
        with contextlib.suppress(OSError):
            os.write(2, f"{signal.Signals(number).name}: saving after this step{more}\n".encode())

    def _deafen(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, self._previous)


def _after_fork() -> None:
    if Signals._inside:
        Signals._inside._deafen()


os.register_at_fork(after_in_child=_after_fork)
