"""Progress of a long operation: a bar rewritten in place on a terminal; elsewhere a line every 10 s, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

from gsdg.utils import terminal

Item = TypeVar("Item")
TERMINAL, LOG = 0.2, 10.0  # seconds between two updates, on a terminal and in a log
WIDTH = 20  # characters in the bar


class Progress:
    """Shows progress: `with Progress("PACS.zip", total, "MB") as progress: progress.add(9)`.

    Args:
        what: name of the operation, at the start of the line.
        total: the final amount, in bytes for unit "MB" and in items for any other unit; None if it is unknown.
        unit: the unit shown after the numbers, such as "MB" or "images".
        done: the amount that an earlier attempt had already completed.
        stream: where to write; default stderr.
        bar_only: write only on a terminal, and erase the bar at the end. If false, a line is written every LOG seconds
            where `stream` is not a terminal, and on a terminal the last line stays.
        note: called whenever the bar is drawn; returns text to append, such as the time left.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        done: int = 0,
        stream: TextIO | None = None,
        *,
        bar_only: bool = False,
        note: Callable[[], str] = str,
    ) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.stream, self.bar_only, self.note = stream or sys.stderr, bar_only, note
        self.terminal = self.stream.isatty()
        self.shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal:
            terminal.erase()
            if not self.bar_only:
                print(self.line(), file=self.stream)

    def add(self, amount: int) -> None:
        """Count `amount` as done, and update what is shown if the last update is long enough ago."""
        self.done += amount
        now = time.monotonic()
        if now - self.shown < (TERMINAL if self.terminal else LOG):
            return
        self.shown = now
        if self.terminal:
            terminal.draw(f"{self.line()}{self._bar()}  {self.note()}".rstrip(), self.stream)
        elif not self.bar_only:
            print(self.line(), file=self.stream, flush=True)

    def line(self) -> str:
        """The text before the bar: `PACS.zip: 5.0 / 40.0 MB (12%)`."""
        if self.total is None:
            return f"{self.what}: {self._shown(self.done)} {self.unit}"
        percent = 100 * self.done // max(1, self.total)
        return f"{self.what}: {self._shown(self.done)} / {self._shown(self.total)} {self.unit} ({percent}%)"

    def _bar(self) -> str:
        if not self.total:
            return ""
        filled = min(WIDTH, WIDTH * self.done // self.total)
        return f" [{'=' * filled}{' ' * (WIDTH - filled)}]"

    def _shown(self, amount: int) -> str:
        return f"{amount / 1e6:,.1f}" if self.unit == "MB" else f"{amount:,}"


def tracked(
    items: Iterable[Item],
    what: str,
    total: int | None,
    unit: str,
    *,
    done: int = 0,
    note: Callable[[], str] = str,
) -> Iterator[Item]:
    """Yield the items and show a bar on a terminal, nothing elsewhere; for the other arguments see `Progress`.

    An item counts as done when the next one is requested.
    """
    with Progress(what, total, unit, done, bar_only=True, note=note) as progress:
        for item in items:
            yield item
            progress.add(1)


def clock_time(seconds: float) -> str:
    """A duration as `HH:MM:SS`: `00:12:05`, or `103:20:00` for more than four days."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"
