"""Everything a bitwise resume needs, on disk, atomically: written beside, flushed, renamed; the last two are kept."""

from __future__ import annotations

import logging
import os
import random
import shutil
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from gsdg.runs import RunFolder
from gsdg.signals import Signals, Stopped

log = logging.getLogger(__name__)
KEEP = 2
Fence = Callable[[], AbstractContextManager]  # such as RunFolder.writing


def random_states() -> dict:
    """The states of every generator a step may draw from, as tensors and plain numbers (`weights_only` loads them)."""
    name, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, list(words), gauss],
    }


def restore_random_states(states: dict) -> None:
    name, keys, *rest = states["numpy"]
    version, words, gauss = states["python"]
    torch.set_rng_state(states["torch"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate((version, tuple(words), gauss))
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def save_atomically(path: Path, state: object, *, fence: Fence = nullcontext) -> None:
    """Write `state` under a name of its own, flush it to the disk, rename. A failure leaves what was there before.

    The renaming, which is when it counts, is done inside `fence()`.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        with fence():
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(
            f"could not write {path}: {str(error).splitlines()[0]} ({free:.0f} MB free there).\n"
            "The checkpoint before it is intact: free some space and run the same command again to resume."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


class Checkpoints:
    """The checkpoints of one run: `step_<number of steps done>.pt` in a folder that changes only inside `fence()`."""

    def __init__(self, folder: Path, fence: Fence = nullcontext) -> None:
        self.folder, self.fence = folder, fence

    def save(self, step: int, state: dict) -> None:
        with self.fence():
            self.folder.mkdir(parents=True, exist_ok=True)
        save_atomically(self.folder / f"step_{step:08d}.pt", {"step": step, **state}, fence=self.fence)
        with self.fence():
            for old in self._newest_first()[KEEP:]:
                old.unlink()

    def load_latest(self) -> dict | None:
        """The newest checkpoint that can be read, on the CPU; None where there is none."""
        for path in self._newest_first():
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged file fails in many ways, all of them mean "take the one before"
                size, reason = path.stat().st_size, str(error).splitlines()[:1]
                log.warning("checkpoint %s (%d bytes) cannot be read, trying the one before: %s", path, size, reason)
        return None

    def remove(self) -> None:
        with self.fence():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.pt"), reverse=True)


class Saver:
    """Saves a run when that is due or a signal asks for it, and stops it after that if the signal asked to stop.

    `parts` are what a step changes, by name; all have state_dict() and load_state_dict().
    """

    def __init__(self, parts: dict, folder: RunFolder, signals: Signals, steps: int) -> None:
        self.parts, self.folder, self.signals, self.steps = parts, folder, signals, steps
        self.checkpoints = Checkpoints(folder.path / "checkpoints", folder.writing)

    def resume(self) -> tuple[int, bool]:
        """Go back to the last checkpoint: (steps done, whether the evaluation after the last of them was cut short)."""
        state = self.checkpoints.load_latest() or {"step": 0}
        start, unrecorded = state["step"], state.get("unrecorded", False)
        self.folder.keep_lines_before(start, recorded=not unrecorded)
        self.folder.progress(start)
        if start:
            for name, part in self.parts.items():
                if name in state:  # an older version saved fewer parts
                    part.load_state_dict(state[name])
            restore_random_states(state["random"])
            log.info("resuming at step %d of %d", start, self.steps)
        return start, unrecorded

    def begin(self) -> None:
        """From now on signals wait for the end of a step. One that has come already cannot have been saved for."""
        self.signals.defer()
        if self.signals.stop:
            raise Stopped(self.signals.stop)

    def after_step(self, done: int, due: bool, refuse: Callable[[], None]) -> None:
        """Save if it is due or was asked for. Stopped if that was asked for and steps are left.

        `refuse` raises if the state is not worth saving; where it is due that has been seen to.
        """
        stop, asked = self.signals.stop, self.signals.take_save()
        if due or asked or stop:
            if not due:
                refuse()
            self._save(done, random_states(), unrecorded=False)
        if stop and done < self.steps:
            self._stop(stop, done)

    def in_evaluation(self, done: int) -> Callable[[], None]:
        """What an evaluation after `done` steps is to call now and then: saves the run as it is now, if asked for."""
        random = random_states()  # loading images draws from them

        def between() -> None:
            stop = self.signals.stop
            if self.signals.take_save() or stop:
                self._save(done, random, unrecorded=True)
            if stop:
                self._stop(stop, done)

        return between

    def _save(self, done: int, random: dict, *, unrecorded: bool) -> None:
        self.folder.flush_lines()  # a record that is lost with its node must not have a checkpoint that counts on it
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self.checkpoints.save(done, {"random": random, "unrecorded": unrecorded, **state})

    def _stop(self, stop: int, done: int) -> NoReturn:
        raise Stopped(stop, f"saved after {done} of {self.steps} steps")
