"""How far a long step is: one line rewritten in place on a terminal, else a line now and then, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TextIO

from gsdg.environment import usable_cores

TERMINAL, LOG = 0.2, 10.0  # seconds between lines
BLOCK = 1024  # images handed to the threads at a time: half a million futures would take more memory than the images


class Progress:
    """`with Progress("PACS.zip", total, "MB") as progress: progress.add(9)`. Unit MB counts bytes; any other, things.

    `total=None`: unknown. `done` is what an earlier start already had.
    """

    def __init__(self, what: str, total: int | None, unit: str, done: int = 0, stream: TextIO | None = None) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal:
            print(f"\r{self.line()}", file=self.stream)

    def add(self, amount: int) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.shown >= (TERMINAL if self.terminal else LOG):
            self.shown = now
            start, end = ("\r", "") if self.terminal else ("", "\n")
            print(f"{start}{self.line()}", end=end, file=self.stream, flush=True)

    def line(self) -> str:
        if self.total is None:
            return f"{self.what}: {self._shown(self.done)} {self.unit}"
        share = 100 * self.done // max(1, self.total)
        return f"{self.what}: {self._shown(self.done)} / {self._shown(self.total)} {self.unit} ({share}%)"

    def _shown(self, amount: int) -> str:
        return f"{amount / 1e6:,.1f}" if self.unit == "MB" else f"{amount:,}"


def in_parallel(function: Callable[[Any], Any], items: Sequence, what: str) -> Iterator:
    """function(item) of each image, in their order, by threads: Pillow and hashlib let go of the interpreter's lock."""
    with ThreadPoolExecutor(usable_cores()) as pool, Progress(what, len(items), "images") as progress:
        for start in range(0, len(items), BLOCK):
            for result in pool.map(function, items[start : start + BLOCK]):
                progress.add(1)
                yield result
