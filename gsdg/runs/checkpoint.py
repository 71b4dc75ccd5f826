"""Checkpoint files: everything that a bit-for-bit resume needs, written atomically. The last two are kept.

A damaged checkpoint is renamed and the one before it is loaded. If the disk cannot be read, that is an error: the
checkpoint may be intact, so nothing is renamed or removed. When a run saves and stops is decided in saver.py.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import socket
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch

from gsdg.runs.disk import NotWritten, not_written
from gsdg.utils.errors import DISK_FULL, UserError, listing
from gsdg.utils.json_files import flush_folder

log = logging.getLogger(__name__)
KEEP = 2  # checkpoints of a run
CHUNK = 2**22  # bytes per read
Fence = Callable[[], AbstractContextManager]  # makes the context to write in, such as RunFolder.writing


def random_states() -> dict:
    """The state of every random number generator that a step may use: torch's, numpy's and Python's.

    It consists of tensors and plain numbers, so that `torch.load(..., weights_only=True)` accepts it.
    """
    state = np.random.get_state()
    assert isinstance(state, tuple)  # a dict only with legacy=False
    name, keys, *rest = state
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, list(words), gauss],
    }


def restore_random_states(states: dict) -> None:
    """Restore what `random_states` returned; the CUDA generators only where as many GPUs are visible as then."""
    name, keys, *rest = states["numpy"]
    version, words, gauss = states["python"]
    torch.set_rng_state(states["torch"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate((version, tuple(words), gauss))
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def save_atomically(path: Path, state: object, *, fence: Fence = nullcontext) -> None:
    """Write `state` to a temporary file, flush it to the disk, then rename it. A failure leaves the old file as it was.

    Args:
        path: of the file.
        state: what torch.save accepts.
        fence: the rename happens inside `fence()`, which may raise to forbid it.

    Raises:
        NotWritten: the file system refuses, for example because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        with fence():
            os.replace(temporary, path)
            flush_folder(path.parent)
    except NotWritten:
        raise
    except (OSError, RuntimeError) as error:
        os_error = _os_error_behind(error)
        if os_error is None:
            raise
        _remove(temporary)  # before the message is made, which names the free space
        raise not_written(path, os_error) from error
    finally:
        _remove(temporary)


def _remove(temporary: Path) -> None:
    with suppress(OSError):  # the disk may have become read-only, which the error that is being raised says already
        temporary.unlink(missing_ok=True)


def _os_error_behind(error: BaseException | None) -> OSError | None:
    """The OSError that caused torch's RuntimeError while it wrote a file; None if there is none, so it is a bug."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def read_checkpoint(path: Path) -> dict:
    """The state in a checkpoint, on the CPU.

    Raises:
        OSError: the disk cannot read the file.
        ValueError: the file is damaged, or holds something else.
    """
    # Read the whole file first: torch and zipfile report a failing disk in the same way as a damaged file.
    with path.open("rb") as file:
        while file.read(CHUNK):
            pass
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not check the checksums
            if name := archive.testzip():
                raise ValueError(f"the checksum of {name} in it is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file raises many types of errors
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from error
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError("it does not hold the state of a run")
    return state


class Checkpoints:
    """The checkpoints of one run, `step_<number of steps done>.pt` in one folder. All changes happen in `fence()`."""

    def __init__(self, folder: Path, fence: Fence = nullcontext) -> None:
        self.folder, self.fence = folder, fence

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.pt"

    def save(self, step: int, state: dict) -> None:
        """Save a checkpoint, then remove all but the last KEEP."""
        with self.fence():
            self.folder.mkdir(parents=True, exist_ok=True)
        self.write(self.path(step), {"step": step, **state})
        others = [path for path in self._newest_first() if path != self.path(step)]
        with self.fence():
            for old in others[max(0, KEEP - 1) :]:
                old.unlink()

    def write(self, path: Path, state: object) -> None:
        """`save_atomically`, for any file of the run. The message of NotWritten says where the run can resume."""
        try:
            save_atomically(path, state, fence=self.fence)
        except NotWritten as error:
            error.args = (f"{str(error).splitlines()[0]}\n{self._how_to_resume(error)}",)
            raise

    def load_latest(self) -> dict | None:
        """The newest checkpoint that is not damaged, on the CPU; None if none was ever saved.

        Raises:
            UserError: all checkpoints are damaged, or the disk cannot read one.
        """
        for path in self._newest_first():
            try:
                return read_checkpoint(path)
            except OSError as error:
                raise UserError(_unreadable(path, error)) from error
            except ValueError as error:
                self._rename_damaged(path, error)
        if damaged := sorted(self.folder.glob("step_*.pt.damaged")):
            raise UserError(
                f"every checkpoint of run {self.folder.parent.name} is damaged: {listing(map(_with_size, damaged))}.\n"
                f"Nothing else was changed. If you have a copy of one, put it back as {damaged[-1].with_suffix('')}; "
                "otherwise add force=true: it removes the run's records and starts it over."
            )
        return None

    def _rename_damaged(self, path: Path, error: ValueError) -> None:
        """Rename a damaged checkpoint, so that it is no longer one of the KEEP that are kept."""
        damaged = path.with_name(f"{path.name}.damaged")
        log.warning(
            "checkpoint %s (%d bytes) is damaged: %s. It is renamed to %s, and the one before it is loaded.",
            path,
            path.stat().st_size,
            error,
            damaged.name,
        )
        with self.fence():
            os.replace(path, damaged)

    def _how_to_resume(self, error: OSError) -> str:
        """What the user can do when a file could not be written."""
        newest = next(iter(self._newest_first()), None)
        remedy = "Free some space" if error.errno in DISK_FULL else "Make that place writable"
        again = f"{remedy} and run the same command again"
        if newest is None:
            return f"No checkpoint was saved before it. {again}: it starts at step 0."
        return f"The checkpoint before it, {newest}, is intact. {again} to resume from it."

    def remove(self) -> None:
        with self.fence():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.pt"), reverse=True)


def _with_size(path: Path) -> str:
    return f"{path.name} ({path.stat().st_size:,} bytes)"


def _unreadable(path: Path, error: OSError) -> str:
    return (
        f"checkpoint {path} cannot be read: {error.strerror or error}.\n"
        "It may be intact, so nothing was changed. Once the disk or the network file system works again, run the same "
        "command: the run resumes from it. force=true starts the run over instead."
    )
