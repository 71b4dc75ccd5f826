"""A status line rewritten in place with log lines above it, and output whose pipe may be closed, as by `| head`."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Generator
from typing import TextIO

ERASE = "\x1b[K"  # from the cursor to the end of the line
_drawn: list[TextIO] = []  # the stream that currently shows a status line: empty or one element


def draw(text: str, stream: TextIO) -> None:
    """Show `text` as the status line. The cursor returns to its start, so that the next output overwrites it."""
    width = shutil.get_terminal_size().columns
    with contextlib.suppress(OSError, ValueError):
        width = os.get_terminal_size(stream.fileno()).columns or width
    stream.write(f"\r{text[: width - 1]}{ERASE}\r")
    stream.flush()
    _drawn[:] = [stream]


def erase() -> None:
    """Erase the status line, if there is one."""
    if _drawn:
        with contextlib.suppress(OSError, ValueError):
            _drawn[0].write(f"\r{ERASE}")
            _drawn[0].flush()
        _drawn.clear()


class Console(logging.StreamHandler):
    """Writes log lines to stdout, above the status line. If the pipe is closed, logging stops and the run continues."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        erase()
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, overrides logging.Handler.handleError
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            discard_stdout()
        else:
            super().handleError(record)


@contextlib.contextmanager
def closed_pipe_is_no_error() -> Generator[None]:
    """Wraps a program: once the reader of its stdout (such as `| head`) has closed the pipe, discard further output."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()


def discard_stdout() -> None:
    """Redirect stdout to /dev/null."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
