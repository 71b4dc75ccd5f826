"""The tables of an evaluation, all made from the frame of predictions, which has a row per image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from gsdg.metrics.predictions import class_summary, confusion_counts, summary, write_predictions
from gsdg.utils.json_files import write_json


def write_tables(folder: Path, frame: pd.DataFrame, about: Mapping) -> pd.DataFrame:
    """Write predictions.parquet, metrics.csv, classes.csv, confusion.csv and evaluation.json; returns the metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(frame, folder / "predictions.parquet")
    table = summary(frame)
    table.to_csv(folder / "metrics.csv", index=False)
    class_summary(frame).to_csv(folder / "classes.csv", index=False)
    confusion_counts(frame).to_csv(folder / "confusion.csv", index=False)
    write_json(folder / "evaluation.json", dict(about))
    return table
