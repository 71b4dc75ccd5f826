"""The weights files of a run, and weights.json, which describes them. `trainer.keep` says which are kept:

- selected: those of the step that training-domain selection picks, the first one with the highest mean held-out
  accuracy of the source domains. They are in `weights/` from the moment that the step is evaluated.
- every: those of every evaluation, also in `weights/`.
- last: those of the last step, `model.pt`.
- none.

With weight averaging, the same for the averaged weights, by their own accuracy: `weights/averaged_step_<s>.pt` and
`model_averaged.pt`. All choices are made from records.jsonl and averaged.jsonl, so a run that is resumed makes the same
ones. Until the next checkpoint the file that was selected before stays too: after a kill the run may resume from a
checkpoint for which that one is the selected file.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gsdg.runs.folder import EVALUATION_FILES, RunFolder
from gsdg.runs.weights_index import FOLDER, INDEX, LAST
from gsdg.utils.errors import listing
from gsdg.utils.json_files import read_lines

log = logging.getLogger(__name__)
Keep = Literal["selected", "last", "every", "none"]
Write = Callable[[Path, object], None]


def held_out_accuracy(accuracy: Mapping[str, Mapping[str, float]], sources: Sequence[str]) -> float | None:
    """The mean of the sources' `out` accuracies, rounded as in the tables' selection; None if no image is held out."""
    held_out = [accuracy[domain]["out"] for domain in sources if "out" in accuracy.get(domain, {})]
    return float(np.mean(held_out)) if held_out else None


class KeptWeights:
    """Writes and removes the weights files of one run.

    Args:
        keep: which weights are kept. None: the selected ones, or the last ones if no image is held out.
        folder: of the run.
        write: writes a file of the run atomically, such as `Checkpoints.write`.
        sources: names of the source domains.
        about: what weights.json says about all files: classes, images, versions.
        left_out: a step whose evaluation a longer run leaves out (gsdg/extend.py): what is selected without it is kept
            too. None: there is none.
    """

    def __init__(
        self,
        keep: Keep | None,
        folder: RunFolder,
        write: Write,
        sources: Sequence[str],
        about: Mapping[str, Any],
        *,
        left_out: int | None = None,
    ) -> None:
        self.keep, self.folder, self.write, self.sources, self.about = keep, folder, write, sources, about
        self.left_out = left_out
        self.best_without: dict[str, tuple[float, int]] = {}
        self.best: dict[str, tuple[float, int]] = {}  # {kind: (held-out accuracy, step)}
        self.best_at_checkpoint: dict[str, tuple[float, int]] = {}  # that of the last checkpoint on the disk
        self.best_at_next_checkpoint: dict[str, tuple[float, int]] = {}  # that of the one being written
        self.last_step: int | None = None  # known after the last step only

    def resume(self) -> None:
        """Find the selected steps in the records that the run keeps; remove all other files of earlier starts."""
        for record in self._records():
            self._improves(record)
        self.best_at_checkpoint = self.best_at_next_checkpoint = dict(self.best)
        if missing := [file.name for file in sorted(self._needed()) if not file.exists()]:
            log.warning("trainer.keep=%s: an earlier start did not keep %s", self.keep or "selected", listing(missing))
        self._remove(self.folder.path / name for name in LAST.values())  # `finish` writes them
        self._tidy()

    def after_evaluation(self, record: dict, state: Callable[[], dict]) -> None:
        """Keep the weights that were evaluated if `keep` asks for them. record: the line that was just appended."""
        improves = self._improves(record)
        if self.keep == "every" or (improves and self._keeps_selected):
            file = self._file(_kind(record), record["step"])
            with self.folder.writing():
                file.parent.mkdir(exist_ok=True)
            self.write(file, state())
            self._tidy()

    def at_checkpoint(self) -> Callable[[], None]:
        """A checkpoint is about to be written: keep what is selected now, as the run may resume from it.

        Returns what to call once it is on the disk, which removes what was selected before.
        """
        self.best_at_next_checkpoint = dict(self.best)
        return partial(self._after_checkpoint, self.best_at_next_checkpoint)

    def _after_checkpoint(self, best: dict[str, tuple[float, int]]) -> None:
        if self.best_at_checkpoint != best:
            self.best_at_checkpoint = best
            self._tidy()

    def finish(self, step: int, states: Mapping[str, Callable[[], dict]]) -> None:
        """After the last step: keep the last weights if `keep` asks for them, and describe all files.

        Args:
            step: the last step.
            states: {kind: the weights of the last step}.
        """
        self.at_checkpoint()()
        self.last_step = step
        if self.keep == "last" or (self.keep is None and not self.best):
            for kind, state in states.items():
                self.write(self.folder.path / LAST[kind], state())
        self._describe({LAST[kind]: (kind, step) for kind in states})

    @property
    def _keeps_selected(self) -> bool:
        return self.keep in (None, "selected", "every")

    def _improves(self, record: dict) -> bool:
        """Whether the record has the highest held-out accuracy so far of its kind, which is noted."""
        accuracy, kind = held_out_accuracy(record["accuracy"], self.sources), _kind(record)
        if accuracy is None or (kind in self.best and accuracy <= self.best[kind][0]):
            return False
        self.best[kind] = accuracy, record["step"]
        if record["step"] != self.left_out:
            self.best_without[kind] = self.best[kind]
        return True

    def _records(self) -> list[dict]:
        return [record for name in EVALUATION_FILES for record in read_lines(self.folder.path / name)]

    def _file(self, kind: str, step: int) -> Path:
        return self.folder.path / FOLDER / f"{kind + '_' if kind else ''}step_{step}.pt"

    def _tidy(self) -> None:
        """Remove the files in weights/ that are not kept, then describe those that are."""
        self._remove(set((self.folder.path / FOLDER).glob("*.pt")) - self._needed())
        self._describe({})

    def _remove(self, files: Iterable[Path]) -> None:
        for file in files:
            with self.folder.writing():
                file.unlink(missing_ok=True)

    def _needed(self) -> set[Path]:
        """The files that `keep` asks for so far, or after a resume from the last checkpoint."""
        if self.keep == "every":
            return {self._file(_kind(record), record["step"]) for record in self._records()}
        if not self._keeps_selected:
            return set()
        without = {} if self.left_out is None else self.best_without
        chosen = (self.best, self.best_at_checkpoint, self.best_at_next_checkpoint, without)
        return {self._file(kind, step) for best in chosen for kind, (_, step) in best.items()}

    def _describe(self, last: Mapping[str, tuple[str, int]]) -> None:
        """Write weights.json, or remove it if there are no files. last: {name of a file: kind and step}."""
        records = {(_kind(record), record["step"]): record for record in self._records()}
        named = {str(self._file(*key).relative_to(self.folder.path)): key for key in records} | dict(last)
        rows = [self._row(name, *key, records.get(key)) for name, key in named.items() if self._exists(name)]
        if rows:
            self.folder.write(INDEX, {**self.about, "weights": rows})
        else:
            with self.folder.writing(), contextlib.suppress(FileNotFoundError):
                (self.folder.path / INDEX).unlink()

    def _exists(self, name: str) -> bool:
        return (self.folder.path / name).is_file()

    def _row(self, name: str, kind: str, step: int, record: dict | None) -> dict:
        """The description of a file: a row of weights.json."""
        accuracy = record["accuracy"] if record else None
        return {
            "file": name,
            "step": step,
            "averaging": (record or {}).get("averaging", kind or None),
            "last": step == self.last_step,
            "selected": kind in self.best and self.best[kind][1] == step,
            "held_out_accuracy": held_out_accuracy(accuracy, self.sources) if accuracy else None,
            "accuracy": accuracy,
        }


def _kind(record: dict) -> str:
    """ "" for the network's own weights, "averaged" for averaged ones: a key of LAST."""
    return "averaged" if "averaging" in record else ""
