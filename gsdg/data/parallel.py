"""Calls a function for many images, in threads, and shows progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gsdg.utils.machine import usable_cores
from gsdg.utils.progress import Progress

BLOCK = 1024  # images submitted to the threads at a time: half a million futures would take more memory than the images


def in_parallel(function: Callable[[Any], Any], items: Sequence, what: str) -> Iterator:
    """Yield function(item) for each item, in order. Threads suffice, because Pillow and hashlib release the GIL.

    what: the name of the operation in the progress line.
    """
    with ThreadPoolExecutor(usable_cores()) as pool, Progress(what, len(items), "images") as progress:
        for start in range(0, len(items), BLOCK):
            for result in pool.map(function, items[start : start + BLOCK]):
                progress.add(1)
                yield result
