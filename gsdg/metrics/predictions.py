"""The frame of predictions: one row per image, with its label, its prediction and the probabilities of all classes.

Columns: file (the image's path; for an image in memory `<domain>[<index>]`), domain, part, label and prediction (class
names), and for each class a column `p_<class>` with its probability. It is what predictions.parquet holds.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from gsdg.metrics.definitions import METRICS, Outcomes, confusion_matrix, recall_per_class
from gsdg.utils.errors import UserError, listing, not_installed
from gsdg.utils.json_files import replace_file
from gsdg.utils.text import align_columns

FIRST = ["file", "domain", "part", "label", "prediction"]
PREFIX = "p_"  # of the columns with probabilities
SMALLEST = np.finfo(np.float32).tiny  # below, a probability has lost its digits: its nll is that of this one, 87.3
MEANINGS = [f"{metric.name}: {metric.explained}" for metric in METRICS.values()]
SUMMARY = ["domain", "part", "images", *METRICS, "worst_class_name"]


def predictions_frame(
    files: Sequence[str],
    domain: str,
    part: str,
    labels: np.ndarray,
    predictions: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
) -> pd.DataFrame:
    """The predictions for N images of one part.

    Args:
        files: the N paths.
        labels, predictions: [N] int, class indices.
        probabilities: [N, classes].
        classes: names of the classes.
    """
    names = {"label": labels, "prediction": predictions}
    columns: dict[str, object] = {"file": list(files), "domain": domain, "part": part}
    columns |= {name: pd.Categorical.from_codes(codes, list(classes)) for name, codes in names.items()}
    columns |= {f"{PREFIX}{name}": column for name, column in zip(classes, probabilities.T, strict=True)}
    return pd.DataFrame(columns)


def classes_of(frame: pd.DataFrame) -> list[str]:
    """The names of the classes, in the order of their indices."""
    return [column.removeprefix(PREFIX) for column in frame.columns[len(FIRST) :]]


def outcomes_of(frame: pd.DataFrame) -> Outcomes:
    """The rows as the metrics need them.

    The nll is computed from probabilities of float32. It is as exact as the one in a run's records, which is computed
    from logits, except for a probability below SMALLEST.
    """
    labels, predictions = (frame[name].cat.codes.to_numpy(dtype=np.int64) for name in ("label", "prediction"))
    probabilities = frame.iloc[:, len(FIRST) :].to_numpy()
    losses = -np.log(probabilities[np.arange(len(frame)), labels].astype(np.float64).clip(SMALLEST))
    return Outcomes(labels, predictions, probabilities.max(axis=1), losses)


def by_part(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(domain, part, its rows), in the order of first appearance."""
    for domain, part in frame[["domain", "part"]].drop_duplicates().itertuples(index=False):
        yield domain, part, frame[(frame["domain"] == domain) & (frame["part"] == part)]


# ---- the summary ----------------------------------------------------------------------------------------------------


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Every metric of each domain and part: columns SUMMARY, values as in records; needs scikit-learn."""
    classes = classes_of(frame)
    rows = []
    for domain, part, of_part in by_part(frame):
        outcomes = outcomes_of(of_part)
        values = [metric.compute(outcomes) for metric in METRICS.values()]
        recalls = recall_per_class(outcomes.labels, outcomes.predictions, len(classes))
        rows.append([domain, part, len(of_part), *values, classes[np.nanargmin(recalls)]])
    return pd.DataFrame(rows, columns=SUMMARY)


def summary_text(table: pd.DataFrame) -> str:
    """The summary as text, shares in percent, and for each part a line that names the domain of lowest accuracy."""
    header = ["domain", "part", "images", *(metric.label for metric in METRICS.values()), "worst class"]
    rows = [
        [
            *(str(row[name]) for name in ("domain", "part", "images")),
            *(f"{metric.scale * row[name]:.{metric.decimals}f}" for name, metric in METRICS.items()),
            row["worst_class_name"],
        ]
        for row in table.to_dict("records")
    ]
    worst = [
        f"worst domain, {part}: {row['domain']} (accuracy {100 * row['accuracy']:.1f} %)"
        for part, of_part in table.groupby("part", sort=False)
        for row in [of_part.loc[of_part["accuracy"].idxmin()]]
        if len(of_part) > 1
    ]
    return "\n".join([*align_columns([header, *rows]), *worst])


def class_summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Per domain, part and class with images: their number, recall, precision (NaN: never predicted) and F1."""
    classes = classes_of(frame)
    rows = []
    for domain, part, of_part in by_part(frame):
        outcomes = outcomes_of(of_part)
        counts = confusion_matrix(outcomes.labels, outcomes.predictions, len(classes))
        for index in np.flatnonzero(counts.sum(axis=1)):
            hits, images, predicted = counts[index, index], counts[index].sum(), counts[:, index].sum()
            precision = hits / predicted if predicted else np.nan
            rows.append(
                [domain, part, classes[index], images, hits / images, precision, 2 * hits / (images + predicted)]
            )
    return pd.DataFrame(rows, columns=["domain", "part", "class", "images", "recall", "precision", "f1"])


def confusion_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """The number of images per domain, part, label and prediction, where it is not 0."""
    keys = ["domain", "part", "label", "prediction"]
    return frame.assign(images=1).groupby(keys, observed=True, sort=False)["images"].sum().reset_index()


def confident_errors(frame: pd.DataFrame, most: int = 12) -> pd.DataFrame:
    """The wrongly classified images with the highest probabilities, highest first, with a column `probability`."""
    wrong = frame[frame["label"] != frame["prediction"]]
    return wrong.assign(probability=wrong.iloc[:, len(FIRST) :].max(axis=1)).sort_values(
        "probability", ascending=False, kind="stable"
    )[:most]


# ---- the file -------------------------------------------------------------------------------------------------------


def write_predictions(frame: pd.DataFrame, path: str | Path) -> None:
    """Replace the Parquet file atomically. UserError: pyarrow is not installed."""
    content = io.BytesIO()
    with pyarrow_needed():
        frame.to_parquet(content, engine="pyarrow", index=False)
    replace_file(Path(path), content.getvalue())


def read_predictions(path: str | Path) -> pd.DataFrame:
    """The frame that `write_predictions` has written.

    Raises:
        UserError: there is no such file, it is damaged or no frame of predictions, or pyarrow is not installed.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read predictions from {path}: {error.strerror or error}.") from None
    with pyarrow_needed():
        try:
            frame = pd.read_parquet(io.BytesIO(content), engine="pyarrow")
        except (OSError, ValueError) as error:  # pyarrow's errors are of both kinds
            raise UserError(f"{path} is damaged or no Parquet file: {str(error).splitlines()[0]}") from None
    if list(frame.columns[: len(FIRST)]) != FIRST or len(frame.columns) == len(FIRST):
        raise UserError(
            f"{path} has no predictions: found the columns {listing(frame.columns)}, expected {listing(FIRST)} and the "
            f"classes' probabilities as {PREFIX}<class>."
        )
    classes = classes_of(frame)
    return frame.assign(**{name: pd.Categorical(frame[name], classes) for name in ("label", "prediction")})


@contextmanager
def pyarrow_needed() -> Generator[None]:
    """Inside, a missing pyarrow is a UserError that names the extra."""
    try:
        yield
    except ImportError:
        raise not_installed("predictions.parquet", "pyarrow", "metrics") from None
