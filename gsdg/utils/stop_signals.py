"""Handling of signals that ask a run to save or to stop. Standard library only.

The handler only sets flags; the run checks them between two steps, where it can save a checkpoint. Until `defer()` a
signal to stop is obeyed at once, because there is nothing to save yet while data and weights are loaded.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from types import FrameType
from typing import Any, NoReturn

from gsdg.utils.terminal import ERASE

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
NOTHING_SAVED = "stopped before the first step, nothing had to be saved"


class Stopped(BaseException):
    """A run stops because of a signal; `message` says what was saved."""

    def __init__(self, number: int, message: str = NOTHING_SAVED) -> None:
        super().__init__(number, message)
        self.signal, self.message = signal.Signals(number), message

    def __str__(self) -> str:
        return f"{self.signal.name}: {self.message}"


class StopRun(Exception):
    """A callback ends a run early: its state becomes `stopped`, with this message as the reason."""


def end(number: int) -> NoReturn:
    """End the program as the signal would have done: KeyboardInterrupt, or SystemExit(128 + number)."""
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


class Signals:
    """Inside `with`, the `stop` signals ask to save and stop, the `save` signals ask to save and go on.

    A handler is installed only where the signal has its default handler: an ignored signal stays ignored (background
    jobs), and one that another library handles is left to that library (submitit). Outside the main thread no handler
    is installed. A second SIGINT raises KeyboardInterrupt at once.

    The signals are blocked in processes that are forked inside, such as data loader workers: SLURM sends a signal to
    every process of a job, and only the run itself may react to it.

    Args:
        stop: numbers of the signals that ask to save and stop.
        save: numbers of the signals that ask to save only.
    """

    _active: Signals | None = None  # the innermost `with`; child processes that are started now block its signals

    def __init__(self, stop: Sequence[int] = STOP, save: Sequence[int] = ()) -> None:
        self.stop: signal.Signals | None = None  # the first signal that asked to stop
        self._to_stop, self._to_save = frozenset(stop), frozenset(save) - frozenset(stop)
        self._deferred = self._save = self._interrupted = False
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}  # {signal: its handler}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._outer, Signals._active = Signals._active, self
            self._children = set(multiprocessing.active_children())
            for number in self._to_stop | self._to_save:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in list(self._previous):
                signal.signal(number, self._previous.pop(number))
            for child in set(multiprocessing.active_children()) - self._children:
                child.kill()  # at exit Python sends it SIGTERM, which it blocks, and would wait for it forever
            Signals._active = self._outer

    def defer(self) -> None:
        """From now on a signal only sets flags; the caller looks at `stop` and `take_save()` after every step."""
        self._deferred = True

    def take_save(self) -> bool:
        """Whether a signal of either kind has come since the last call."""
        asked, self._save = self._save, False
        return asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._save = True
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        if number in self._to_stop:
            self.stop = self.stop or signal.Signals(number)
            if not self._deferred:
                self._deferred = True  # the next signal must not interrupt what the run now writes about this one
                raise Stopped(number)
        self._print(number)

    def _print(self, number: int) -> None:
        """Confirm the signal on stderr. Not with logging: the handler may have interrupted a logging call."""
        more = " (again to stop at once)" if number == signal.SIGINT else ""
        with contextlib.suppress(OSError):
            start = ERASE if os.isatty(2) else ""  # erases the progress bar
            os.write(2, f"{start}{signal.Signals(number).name}: saving after this step{more}\n".encode())

    def _block_in_child(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, self._previous)


@contextlib.contextmanager
def blocked_in_children() -> Generator[None]:
    """Processes that are started inside, by any start method, block the signals that the active `Signals` handles.

    A child inherits the signal mask of its parent. A signal that reaches the parent meanwhile is delivered afterwards.
    """
    numbers = Signals._active._previous if Signals._active else ()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _after_fork() -> None:
    if Signals._active:
        Signals._active._block_in_child()


os.register_at_fork(after_in_child=_after_fork)
