"""Worker processes that prepare batches on the host: how they start, which signals they block, their shared memory.

On Linux workers are forked: they start at once and share the parent's memory. Elsewhere each worker imports torch
again, which takes seconds, so the workers of an evaluation are kept for the next one. With every start method, the
signals that the run handles are blocked in the workers from their first instruction. SLURM and Ctrl-C send a signal to
the whole process tree, and a run whose worker was killed by it could not save a checkpoint.
"""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from gsdg.utils.errors import UserError
from gsdg.utils.stop_signals import blocked_in_children

log = logging.getLogger(__name__)
START_METHOD = "fork" if sys.platform == "linux" else None  # None: the system's default, spawn on macOS
PREFETCH = 2  # batches per worker that are being prepared or wait to be used
SHARED_MEMORY = Path("/dev/shm")  # Linux's shared memory between processes; 64 MB in a Docker container


def context() -> BaseContext:
    """The multiprocessing context in which workers are started."""
    return multiprocessing.get_context(START_METHOD)


class Batches(Protocol):
    """What worker processes prepare: `batches[key]`, of which each process has a copy."""

    def __getitem__(self, key: Any, /) -> object: ...


class HostLoader:
    """Prepares batches in worker processes: `loader(keys)` yields batches[key] for each key, in order.

    With CUDA the tensors are in pinned memory. A UserError raised in a worker is raised unchanged in this process.

    Args:
        batches: maps a key to a batch.
        workers: number of worker processes; 0: batches are prepared in this process.
        device: where the batches will be used.
        reuse: the loader will be called several times, so workers that are slow to start are kept between calls.
    """

    def __init__(self, batches: Batches, *, workers: int, device: torch.device, reuse: bool) -> None:
        self._sampler = _SettableSampler()
        forked = workers == 0 or context().get_start_method() == "fork"
        self._loader = DataLoader(
            _ReturnsUserErrors(batches),
            batch_size=None,
            sampler=self._sampler,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            multiprocessing_context=context() if workers else None,
            persistent_workers=reuse and not forked,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # without it, every iteration draws a seed from torch's global generator
        )
        self._forked = forked

    def __call__(self, keys: Iterable) -> Iterator:
        self._sampler.keys = keys
        with _signals_blocked(self._forked):
            items = iter(self._loader)
        for item in items:
            if isinstance(item, UserError):
                raise item
            yield item

    def close(self) -> None:
        """End the worker processes that are kept for the next call."""
        iterator, self._loader._iterator = self._loader._iterator, None  # private: torch has no public method for it
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()


class _SettableSampler:
    """A sampler whose keys are set before each iteration."""

    keys: Iterable = ()

    def __iter__(self) -> Iterator:
        return iter(self.keys)


class _ReturnsUserErrors(Dataset):
    """Returns a UserError instead of raising it, because torch would replace its message by the worker's traceback."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, index: Any) -> object:
        try:
            return self.batches[index]
        except UserError as error:
            return error


@contextmanager
def _signals_blocked(forked: bool) -> Generator[None]:
    """Block the signals that the run handles in the processes that are started inside."""
    if not forked:
        # Starting multiprocessing's resource tracker unblocks SIGINT and SIGTERM in this process. Therefore it starts
        # before the workers, in a block of its own.
        with blocked_in_children():
            resource_tracker.ensure_running()
    with blocked_in_children():
        yield


# ---- shared memory --------------------------------------------------------------------------------------------------


def fitting_workers(workers: int, *, chosen: bool, batch_bytes: int) -> int:
    """The number of workers, reduced if shared memory is too small for the batches that wait there.

    Args:
        workers: the wanted number.
        chosen: the user has set this number; then too little memory is a UserError instead of fewer workers.
        batch_bytes: bytes of one training batch plus one evaluation batch.
    """
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None
    if free is None or bytes_in_flight(workers, batch_bytes) <= free:
        return workers
    fitting = max(0, (free // batch_bytes - 1) // PREFETCH)
    message = (
        f"{workers} processes that load images keep up to {bytes_in_flight(workers, batch_bytes) / 1e6:,.0f} MB of "
        f"batches in {SHARED_MEMORY}, where {free / 1e6:,.0f} MB are free"
    )
    larger = f"make {SHARED_MEMORY} larger (docker run --shm-size=2g, or --ipc=host)"
    if chosen:
        raise UserError(
            f"trainer.workers={workers}: {message}. The run would end in a bus error.\n"
            f"Set trainer.workers={fitting}, make trainer.batch_size smaller, or {larger}."
        )
    log.warning("%s: %d are started instead. For more processes, %s.", message, fitting, larger)
    return fitting


def bytes_in_flight(workers: int, batch_bytes: int) -> int:
    """Bytes of the batches that the workers have prepared, and of the one handed over last."""
    return (PREFETCH * workers + 1) * batch_bytes if workers else 0
