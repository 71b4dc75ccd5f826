"""Lists the runs of a sweep in its folder, from which the table at the end of the sweep is made. No torch.

Hydra calls `SweepCallback` before the first job; every job adds the id of its run to the sweep's folder. Hydra's return
values are not used, because one killed job would lose all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from hydra.experimental.callback import Callback

from gsdg.config.places import absolute_path
from gsdg.utils.json_files import append_text


class SweepCallback(Callback):
    """Holds the folders and the size of the sweep that this process launched, for the table at the end.

    Class attributes:
        folder: the sweep's folder; None if this process launched no sweep.
        runs_dir: the folder of the runs.
        size: number of runs of the sweep; None where the sweeper does not know it in advance.
        draws: the keys that a search has drawn, so that its runs are draws of one method in the table.
    """

    folder: Path | None = None
    runs_dir: Path | None = None
    size: int | None = None
    draws: ClassVar[list[str]] = []

    def on_multirun_start(self, config, **kwargs) -> None:
        SweepCallback.folder = Path(absolute_path(config.hydra.sweep.dir))
        SweepCallback.runs_dir = Path(absolute_path(config.runs_dir))


def note_run(folder: Path, run_id: str) -> None:
    """Add the id of a run to the list in the sweep's folder."""
    append_text(folder / "runs.txt", run_id + "\n")


def noted_runs(folder: Path) -> list[str]:
    """The run ids in the list of the sweep's folder, in order, each once."""
    path = folder / "runs.txt"
    return list(dict.fromkeys(path.read_text().split())) if path.exists() else []
