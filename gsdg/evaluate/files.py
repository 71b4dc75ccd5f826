"""The files of an evaluation. predictions.parquet has a row per image, and all other files are made from such rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from gsdg.analysis import prediction_figures, style
from gsdg.analysis.prediction_figures import MOST_POINTS, Embedding
from gsdg.evaluate.passes import Evaluation
from gsdg.evaluation.predictions import load_images
from gsdg.metrics.predictions import class_summary, confident_errors, confusion_counts, summary, write_predictions
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


def write_figures(folder: Path, evaluation: Evaluation, frame: pd.DataFrame, form: str, how: Embedding) -> None:
    """Write the figures `confusion`, `reliability`, `errors` and `features`.

    Args:
        folder: of the files.
        evaluation: that made the predictions; it makes the features.
        frame: the predictions.
        form: the files' suffix: pdf, png or svg.
        how: the map of the features.
    """
    prediction_figures.confusions(frame).save(folder / f"confusion.{form}")
    prediction_figures.reliabilities(frame).save(folder / f"reliability.{form}")
    errors = confident_errors(frame)
    pixels = [np.asarray(image) for image in load_images(evaluation.images.evaluator.dataset, errors)]
    with style.print_style():
        prediction_figures.gallery(errors, pixels).savefig(folder / f"errors.{form}")
    rows = drawn(len(frame))
    maps = prediction_figures.feature_maps(evaluation.features(rows), frame.iloc[rows], how)
    maps.save(folder / f"features.{form}")


def drawn(count: int, most: int = MOST_POINTS) -> np.ndarray:
    """The numbers of `most` of `count` rows, drawn at random and sorted; of all rows if there are no more."""
    return np.sort(np.random.RandomState(0).choice(count, min(count, most), replace=False))
