"""TensorBoard: event files in <run>/tensorboard/<title>, because TensorBoard calls a run by its path.

`tensorboard --logdir runs` shows all runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from gsdg.callbacks import WatchedRun
from gsdg.loggers.base import Logger, require


class TensorBoard(Logger):
    """The files of earlier starts are replaced by one with the same steps, so that none is there twice."""

    def __init__(self) -> None:
        require("tensorboard", "tensorboard")

    def open(self, run: WatchedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard" / run.title
        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
        self.writer = SummaryWriter(str(folder))
        self.writer.add_text("config", f"```json\n{json.dumps(run.config, indent=2, default=str)}\n```")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, state: str) -> None:
        self.writer.close()
