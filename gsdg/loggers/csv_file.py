"""metrics.csv in the run's folder, one number per row: step, name, value.

As a table with pandas:

    pd.read_csv("runs/<id>/metrics.csv").pivot(index="step", columns="name", values="value")

The numbers and their names are those of values.py.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping

from gsdg.callbacks import WatchedRun
from gsdg.loggers.base import Logger


class CSV(Logger):
    """The file is written anew at each start of the run."""

    def open(self, run: WatchedRun) -> None:
        self.path = run.folder / "metrics.csv"
        with self.path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(["step", "name", "value"])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([step, name, value] for name, value in values.items())

    def close(self, state: str) -> None:
        """Every row is in the file already."""
