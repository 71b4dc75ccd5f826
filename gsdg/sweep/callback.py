"""What a sweep leaves behind, so that its table is made from disk: the list of its runs. No torch.

Hydra calls `SweepCallback` before the first job; every job adds its run's id to the sweep's folder. Nothing is
taken from return values: one killed job would lose them all.
"""

from __future__ import annotations

from pathlib import Path

from hydra.experimental.callback import Callback


class SweepCallback(Callback):
    """Remembers which sweep this process has launched, for the table at its end."""

    folder: Path | None = None
    runs_dir: Path | None = None

    def on_multirun_start(self, config, **kwargs) -> None:
        SweepCallback.folder = Path(config.hydra.sweep.dir)
        SweepCallback.runs_dir = Path(config.runs_dir)


def note_run(folder: Path, run_id: str) -> None:
    """Add a run to the sweep in `folder`. One short append: concurrent jobs do not tear each other's lines."""
    with (folder / "runs.txt").open("a") as file:
        file.write(run_id + "\n")


def noted_runs(folder: Path) -> list[str]:
    """The ids noted in `folder`, in order, each once."""
    path = folder / "runs.txt"
    return list(dict.fromkeys(path.read_text().split())) if path.exists() else []
