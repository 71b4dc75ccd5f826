"""Reads weights.json, which says which weights a run has kept (kept_weights.py writes it). Standard library only.

A run from before there was a weights.json has only the weights of its last step, model.pt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gsdg.runs.folder import RunFolder
from gsdg.utils.errors import UserError, listing
from gsdg.utils.json_files import read_json

FOLDER, INDEX = "weights", "weights.json"
LAST = {"": "model.pt", "averaged": "model_averaged.pt"}  # by kind of weights: the network's own, or averaged
STATE = "state.pt"  # everything that trains on from the last step, with trainer.keep_state
WEIGHTS = (FOLDER, INDEX, STATE, *LAST.values())  # every file and folder of weights in a run's folder


def is_run(folder: Path) -> bool:
    return (folder / "status.json").is_file()


def rows_of(run: Path) -> list[dict]:
    """The rows of weights.json, one per file: file, step, averaging, selected, last, held_out_accuracy, accuracy."""
    older = [(name, kind or None) for kind, name in LAST.items() if (run / name).is_file()]
    unknown = {"step": None, "held_out_accuracy": None, "accuracy": None, "selected": False, "last": True}
    return read_json(run / INDEX).get("weights") or [
        {"file": name, "averaging": kind, **unknown} for name, kind in older
    ]


def find_weights(run: Path, which: str = "") -> dict:
    """The row of one of a finished run's weights.

    Args:
        run: its folder.
        which: "selected" or "last"; "averaged" (the selected average, or else the last); or the name of a file in the
            run's folder. "": selected, or else last.

    Raises:
        UserError: the folder is not that of a finished run, or the run has no such weights.
    """
    state = read_json(run / "status.json").get("state")
    if state != "done":
        found = f"the run is not done, its state is {state}" if state else "there is no run in this folder"
        raise UserError(f"{run}: {found}.\nName the folder of a finished run; python -m gsdg.runs list shows them.")
    rows = sorted(rows_of(run), key=lambda row: (not row["selected"], not row["last"]))
    for row in rows:
        roles = [role for role in ("selected", "last") if row[role]]
        names = [row["file"], *(["averaged"] if row["averaging"] else ["", *roles] if roles else [])]
        if which in names:
            return row
    raise UserError(
        f"{run}: the run has kept no {which + ' ' if which else ''}weights; it has: "
        f"{listing(row['file'] for row in rows)}.\n"
        "trainer.keep=selected (or last, every) keeps them; with force=true a finished run is made again."
    )


def classes_of(weights: Path) -> Sequence[str] | None:
    """The classes of the run to which a weights file belongs; None if it does not lie in a run's folder."""
    described = (read_json(folder / INDEX) for folder in (weights.parent, weights.parent.parent))
    return next((about["classes"] for about in described if "classes" in about), None)


def lacks_weights(folder: RunFolder, keep: str | None) -> bool:
    """Whether a finished run has not kept the weights, other than averaged ones, that `trainer.keep` asks for."""
    rows = [row for row in rows_of(folder.path) if not row["averaging"]]
    steps = {row["step"] for row in rows}
    kept = {
        "selected": any(row["selected"] for row in rows),
        "last": any(row["last"] for row in rows),
        "every": all(record["step"] in steps for record in folder.records()),
    }
    return keep in kept and not kept[keep]
