"""What all loggers have in common. To add one: a subclass of `Logger` with open, log and close, and a YAML.

A logger gets the numbers of each line that the run writes (values.py). At every start it first gets those of all lines
that are in the run's folder, so it must not add a step twice: CSV and TensorBoard begin their files anew, MLflow and
W&B leave out the steps that they have. Steps that were logged after the last checkpoint are therefore there once, and a
logger that is added to a run later has the earlier steps too.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from gsdg.callbacks import Callback, WatchedRun
from gsdg.loggers.values import all_values, of_average, of_diagnosis, of_record
from gsdg.utils.errors import not_installed
from gsdg.utils.json_files import load_json, write_json

log = logging.getLogger(__name__)
IDS = "loggers.json"  # in the run's folder: {logger and destination: the id that the run has there}


class Logger(Callback, ABC):
    """Sends numbers of a run somewhere. After an exception it says so once, as a warning, and is off from then on."""

    off = False

    @abstractmethod
    def open(self, run: WatchedRun) -> None:
        """Connect. The numbers of all lines of the run's folder follow, then those of new lines."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of one step. Steps never decrease; one step may come in several calls."""

    @abstractmethod
    def close(self, state: str) -> None:
        """Send what is still to be sent. state: `done`, `stopped` (the run will be resumed), or `failed`."""

    def start(self, run: WatchedRun, step: int) -> None:
        self.off = False
        with self._off_after_an_error():
            self.open(run)
            for line_step, values in all_values(run.folder, run.sources):
                self.log(line_step, values)

    def evaluation(self, run: WatchedRun, record: dict) -> None:
        self._send(record, of_record(record, run.sources))

    def averaged(self, run: WatchedRun, record: dict) -> None:
        self._send(record, of_average(record, run.sources))

    def diagnosis(self, run: WatchedRun, diagnosis: dict) -> None:
        self._send(diagnosis, of_diagnosis(diagnosis))

    def end(self, run: WatchedRun, state: str) -> None:
        if not self.off:
            with self._off_after_an_error():
                self.close(state)

    def _send(self, line: dict, values: Mapping[str, float]) -> None:
        if not self.off:
            with self._off_after_an_error():
                self.log(line["step"], values)

    @contextmanager
    def _off_after_an_error(self) -> Generator[None]:
        try:
            yield
        except Exception as error:
            self.off = True
            log.warning(
                "logger %s failed and is off from now on; the run goes on, and python -m gsdg.log sends its records "
                "later: %s: %s",
                type(self).__name__,
                type(error).__name__,
                error,
            )
            log.debug("logger %s", type(self).__name__, exc_info=True)


def require(library: str, choice: str) -> None:
    """UserError if the library of a logger is not installed. A folder of its name, such as ./wandb, is no library."""
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        raise not_installed(f"logger={choice}", library, "loggers")


def id_of_run(folder: Path, destination: str, create: Callable[[], str]) -> str:
    """The id that the run has at a destination, from an earlier start or else created now. It is kept in loggers.json.

    destination: a logger's name and an address, of which only a hash is written, because it may hold a password.
    """
    name, _, address = destination.partition(" ")
    key = f"{name} {sha256(address.encode()).hexdigest()[:12]}"
    ids = load_json(folder / IDS)
    if key not in ids:
        ids[key] = create()
        write_json(folder / IDS, ids)
    return ids[key]
