"""Code that watches a run: the loggers of gsdg/loggers, and the user's own classes. It cannot change a result.

A callback is a subclass of `Callback` with one hook or more, in the user's package:

    class Largest(Callback):
        def evaluation(self, run, record):
            print(record["step"], max(record["metrics"].values()))

and `python launch.py +callbacks.largest._target_=mine.Largest`, or a file `callbacks/largest.yaml` in the folder of
`--config-dir` with the node `largest: {_target_: mine.Largest}`, and `callbacks=largest`.

The state of all random number generators is restored after each hook. To end a run early, raise
`gsdg.utils.stop_signals.StopRun("why")`: its state is then `stopped`, and the same command without the callback goes
on. Any other exception in a hook fails the run, with its traceback. If a callback has `state_dict` and
`load_state_dict`, its state is part of the checkpoints: a dict of tensors and plain values. A run that is killed
resumes from its last checkpoint, so steps after it are seen again.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from gsdg.algorithms import Algorithm
from gsdg.runs.checkpoint import random_states, restore_random_states
from gsdg.runs.run_log import stop_reason


@dataclass(frozen=True)
class WatchedRun:
    """The run that a callback watches.

    Attributes:
        folder: path of the run's folder; a callback may write files of its own there.
        config: the resolved config.
        algorithm: set up, on the training device; None where a finished run is read (`python -m gsdg.log`).
    """

    folder: Path
    config: Mapping[str, Any]
    algorithm: Algorithm | None = None

    @property
    def sources(self) -> list[str]:
        """The names of the source domains."""
        return [name for name in self.config["dataset"]["domains"] if name not in self.config["split"]["target"]]

    @property
    def title(self) -> str:
        """What the run is called in lists of runs, without its id: `erm_sketch_0`, algorithm, target and trial."""
        split = self.config["split"]
        words = f"{self.config['algorithm']['name']}_{'+'.join(split['target'])}_{split['trial_seed']}"
        return re.sub(r"[^\w+.-]", "-", words)


class Callback:
    """Hooks that the training loop calls; those that a subclass does not define do nothing."""

    def start(self, run: WatchedRun, step: int) -> None:
        """Before the first step that this process makes. step: 0, or where the run is resumed."""

    def step(self, run: WatchedRun, step: int, metrics: Mapping[str, Tensor]) -> None:
        """After each update, before its evaluation if it has one.

        Args:
            metrics: {name: 0-dim tensor on the training device}. Reading one with `.item()` waits for the device. A
                later step may overwrite them (CUDA graphs), so keep copies.
        """

    def evaluation(self, run: WatchedRun, record: dict) -> None:
        """After an evaluation. record: the line of records.jsonl, see `RunFolder.append_record`."""

    def averaged(self, run: WatchedRun, record: dict) -> None:
        """After an evaluation of averaged weights. record: the line of averaged.jsonl."""

    def diagnosis(self, run: WatchedRun, diagnosis: dict) -> None:
        """After a step whose diagnostics are logged. diagnosis: the line of diagnostics.jsonl."""

    def end(self, run: WatchedRun, state: str) -> None:
        """Once per process, if `start` was called. state: `done`; `stopped`, to be resumed; or `failed`."""


class Callbacks:
    """The callbacks of one run, called in the order of the config.

    Args:
        callbacks: {name in the config: callback}.
        run: what they watch; None without callbacks.
    """

    def __init__(self, callbacks: Mapping[str, Callback] = MappingProxyType({}), run: WatchedRun | None = None) -> None:
        self.callbacks, self.run = dict(callbacks), run
        self._started: list[Callback] = []
        self._per_step = [one for one in self.callbacks.values() if type(one).step is not Callback.step]

    @property
    def have_state(self) -> bool:
        return bool(self._with_state())

    def start(self, step: int) -> None:
        for callback in self.callbacks.values():
            self._started.append(callback)
            with _random_states_kept():
                callback.start(self._watched(), step)

    def step(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """Nothing at all unless a callback defines `step`."""
        for callback in self._per_step:
            with _random_states_kept():
                callback.step(self._watched(), step, metrics)

    def line(self, hook: str, line: dict) -> None:
        """Call `evaluation`, `averaged` or `diagnosis` of every callback."""
        for callback in self.callbacks.values():
            with _random_states_kept():
                getattr(callback, hook)(self._watched(), line)

    def end(self, error: BaseException | None = None) -> None:
        """Call `end` of every callback that has started and not ended. error: what ends the run before it is done."""
        state = "done" if error is None else "stopped" if stop_reason(error) else "failed"
        while self._started:
            with _random_states_kept():
                self._started.pop(0).end(self._watched(), state)

    def state_dict(self) -> dict:
        return {name: callback.state_dict() for name, callback in self._with_state().items()}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Callbacks that were added after the checkpoint was saved keep the state that they have."""
        for name, callback in self._with_state().items():
            if name in states:
                callback.load_state_dict(states[name])

    def _with_state(self) -> dict[str, Any]:
        return {name: callback for name, callback in self.callbacks.items() if hasattr(callback, "state_dict")}

    def _watched(self) -> WatchedRun:
        assert self.run is not None, "a run with callbacks says what they watch"
        return self.run


@contextmanager
def _random_states_kept() -> Generator[None]:
    """Whatever random numbers are drawn inside, those of the training stay the same."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)
