"""The figures of an evaluation. Needs matplotlib (extra `plots`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from gsdg.analysis import prediction_figures, style
from gsdg.analysis.prediction_figures import Embedding
from gsdg.evaluate.passes import Evaluation
from gsdg.evaluation.predictions import load_images
from gsdg.metrics.predictions import confident_errors


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
    rows = prediction_figures.drawn(len(frame))
    maps = prediction_figures.feature_maps(evaluation.features(rows), frame.iloc[rows], how, total=len(frame))
    maps.save(folder / f"features.{form}")
