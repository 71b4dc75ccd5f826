"""When a run saves a checkpoint, when it stops, and how it resumes. Reading and writing the files: checkpoint.py.

The state is copied, and a thread writes it while the training goes on. The run waits for it before the next checkpoint,
before it stops and at its end; an error while writing is raised there.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from gsdg.runs.checkpoint import Checkpoints, random_states, restore_random_states
from gsdg.runs.folder import RunFolder
from gsdg.runs.weights_index import STATE
from gsdg.utils.errors import UserError, listing
from gsdg.utils.stop_signals import Signals, Stopped

log = logging.getLogger(__name__)


def _nothing() -> None:
    """Called where nothing waits for a checkpoint."""


ESSENTIAL = ("algorithm", "optimizer", "random")  # a run that resumes without one of these would compute other numbers


class Saver:
    """Saves a run when a checkpoint is due or a signal asks for it, and then stops it if the signal asks to stop.

    Args:
        parts: {name: object} of everything that a step changes; each has state_dict() and load_state_dict().
        folder: of the run, held by this process.
        signals: notes the signals that ask to save or to stop.
        steps: of the whole run.
    """

    def __init__(self, parts: dict, folder: RunFolder, signals: Signals, steps: int) -> None:
        self.parts, self.folder, self.signals, self.steps = parts, folder, signals, steps
        self.checkpoints = Checkpoints(folder.path / "checkpoints", folder.writing)
        self._writing: Future | None = None  # the checkpoint that a thread writes
        self._written: Callable[[], None] = _nothing  # to be called when it is on the disk

    def resume(self) -> tuple[int, bool]:
        """Restore the last checkpoint, if there is one, and drop the records that were made after it.

        Returns:
            The number of steps done, and whether the evaluation after the last of them was interrupted.
        """
        state = self.checkpoints.load_latest() or {"step": 0}
        start, unrecorded = state["step"], state.get("unrecorded", False)
        if start:
            self._restore(state, self.checkpoints.path(start))
        elif self.folder.records():
            log.info(
                "an earlier start left records but no checkpoint: the run starts again at step 0 and replaces them"
            )
        self.folder.keep_lines_before(start, recorded=not unrecorded)
        self.folder.progress(start)
        if start:
            log.info("resuming at step %d of %d", start, self.steps)
        return start, unrecorded

    def _restore(self, state: dict, path: Path) -> None:
        """UserError where the checkpoint does not fit what this config and this code build now."""
        missing = [name for name in (*self.parts, "random") if name not in state]
        if required := [name for name in missing if name in ESSENTIAL]:
            raise UserError(_misfit(path, f"it holds no {listing(required)}"))
        for name in (name for name in self.parts if name in state):
            try:
                self.parts[name].load_state_dict(state[name])
            except (RuntimeError, ValueError, KeyError) as error:  # what torch raises for other shapes, groups or names
                raise UserError(_misfit(path, f"{name}: {error}")) from error
        restore_random_states(state["random"])
        if missing:  # an older version saved fewer parts
            log.warning(
                "checkpoint %s holds no %s, which starts from scratch: the records from here on may differ from those "
                "of a run without an interruption",
                path,
                listing(missing),
            )

    def begin(self) -> None:
        """From now on a signal waits for the end of the step. A signal that came before stops the run at once."""
        self.signals.defer()
        if self.signals.stop:
            raise Stopped(self.signals.stop)

    def after_step(
        self,
        done: int,
        due: bool,
        check_state: Callable[[], None],
        at_save: Callable[[], Callable[[], None]] = lambda: _nothing,
    ) -> None:
        """Save if a checkpoint is due or a signal asks for it.

        Args:
            done: steps made so far.
            due: whether a checkpoint is due after this step; its state has been checked already.
            check_state: raises if the state must not be saved, because a loss or a gradient is not finite.
            at_save: called when the state is copied; what it returns is called, in this thread, some time after the
                checkpoint is on the disk.

        Raises:
            Stopped: a signal asks to stop, and steps are left.
        """
        stop, asked = self.signals.stop, self.signals.take_save()
        if due or asked or stop:
            if not due:
                check_state()
            self._save(done, random_states(), unrecorded=False)
            self._written = at_save()
        if stop and done < self.steps:
            self._stop(stop, done)

    def evaluation_hook(self, done: int) -> Callable[[], None]:
        """What an evaluation after `done` steps calls after every batch: it saves and stops if a signal asks for it.

        The checkpoint holds the RNG state of now, because loading images draws random numbers.
        """
        random = random_states()

        def save_if_asked() -> None:
            stop = self.signals.stop
            if self.signals.take_save() or stop:
                self._save(done, random, unrecorded=True)
            if stop:
                self._stop(stop, done)

        return save_if_asked

    def keep_state(self, done: int) -> None:
        """Write what a longer run starts from, after `done` steps, in the form of a checkpoint: trainer.keep_state."""
        state = {"step": done, **self._state(random_states(), unrecorded=False)}
        self.checkpoints.write(self.folder.path / STATE, state)

    def _save(self, done: int, random: dict, *, unrecorded: bool) -> None:
        self.wait()
        self.folder.flush_lines()  # first: after a crash no checkpoint may be newer than the records on disk
        state = _copied(self._state(random, unrecorded=unrecorded))
        executor = ThreadPoolExecutor(1, "checkpoint")
        self._writing = executor.submit(self.checkpoints.save, done, state)
        executor.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk. NotWritten, LockLost: it could not be written."""
        writing, written = self._writing, self._written
        self._writing, self._written = None, _nothing
        if writing:
            writing.result()
            written()

    def close(self) -> None:
        """The run ends, perhaps with an error: wait for the last checkpoint, and raise nothing more."""
        with suppress(Exception):
            self.wait()

    def _state(self, random: dict, *, unrecorded: bool) -> dict:
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {"random": random, "unrecorded": unrecorded, **parts}

    def _stop(self, stop: int, done: int) -> NoReturn:
        self.wait()
        raise Stopped(stop, f"saved after {done} of {self.steps} steps")


def _copied(value: Any) -> Any:
    """The state with copies of its tensors on the CPU, which the next step does not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps the attribute with versions that torch's state dicts have
        copied.update((key, _copied(item)) for key, item in value.items())
        return copied
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def _misfit(path: Path, reason: str) -> str:
    lines = [line.strip() for line in reason.splitlines()[:4]]
    return (
        f"checkpoint {path} does not fit what the code builds from this config now: {' '.join(lines)}\n"
        f"Restore the code that it was saved with ({path.parents[1] / 'environment.jsonl'} names its commit), or add "
        "force=true: it removes the run's records and starts it over."
    )
