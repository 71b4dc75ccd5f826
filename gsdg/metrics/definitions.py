"""The metrics, each a function of what was predicted for the images of one domain and part.

A class without images in the part has no recall. The metrics over classes (balanced_accuracy, macro_f1, worst_class)
are over the classes that have images, as in WILDS (Koh et al., ICML 2021, arXiv:2012.07421), whose code passes
`labels=unique(y_true)` to scikit-learn. Deviation from scikit-learn: there, macro F1 also counts a class that is
predicted but has no image, with F1 = 0. Its balanced accuracy is the same as here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, TypeGuard

import numpy as np

from gsdg.utils.errors import UserError, listing, not_installed

BINS = 15  # of the expected calibration error, as in Guo et al.


class Outcomes(NamedTuple):
    """What was predicted for N >= 1 images. An array that the wanted metrics do not need may be empty.

    Args:
        labels: [N] int, the true classes.
        predictions: [N] int, the predicted classes.
        confidences: [N], the probability of the predicted class.
        losses: [N], the negative log-likelihood of the true class, in nats.
    """

    labels: np.ndarray
    predictions: np.ndarray = np.empty(0, dtype=np.int64)
    confidences: np.ndarray = np.empty(0)
    losses: np.ndarray = np.empty(0)


@dataclass(frozen=True)
class Metric:
    """A number that a classifier is judged by.

    Args:
        name: in trainer.metrics, in records and in tables.
        explained: what it is, as the end of a sentence.
        compute: the metric of the images of one domain and part; a share is a fraction.
        needs: the arrays of Outcomes that it is computed from, besides the labels.
        lower_is_better: whether a selection looks for the lowest value.
        percent: whether it is a share in [0, 1], which tables show in percent.
    """

    name: str
    explained: str
    compute: Callable[[Outcomes], float]
    needs: Sequence[str] = ("predictions",)
    lower_is_better: bool = False
    percent: bool = True

    @property
    def scale(self) -> int:
        """Factor from the recorded value to the one that tables and plots show."""
        return 100 if self.percent else 1

    @property
    def label(self) -> str:
        """With its unit: `accuracy, %`, `nll`."""
        return f"{self.name}, %" if self.percent else self.name

    @property
    def decimals(self) -> int:
        """The decimals of a mean in a table."""
        return 1 if self.percent else 3

    def is_valid(self, value: object) -> TypeGuard[float]:
        """Whether a value from a record can be one of this metric."""
        upper = 1 if self.percent else float("inf")
        return type(value) in (int, float) and 0 <= value <= upper and value != float("inf")  # ty: ignore


# ---- the arrays behind the metrics ----------------------------------------------------------------------------------


def recall_per_class(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """[classes]: the share of each class's images that are predicted to be of it; NaN for a class without images."""
    images, hits = (np.bincount(rows, minlength=classes) for rows in (labels, labels[labels == predictions]))
    return np.divide(hits, images, out=np.full(classes, np.nan), where=images > 0)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """[classes, classes] int: the number of images by true class (row) and predicted class (column)."""
    return np.bincount(classes * labels + predictions, minlength=classes**2).reshape(classes, classes)


class Calibration(NamedTuple):
    """The images in bins of equal width by their confidence, each array [bins]; NaN for a bin without images."""

    images: np.ndarray  # number of images
    confidence: np.ndarray  # their mean confidence
    accuracy: np.ndarray  # the share of them that is predicted correctly

    @property
    def error(self) -> float:
        """The expected calibration error (Guo et al., ICML 2017, arXiv:1706.04599, equation 3).

        ECE = sum_m |B_m| / n * |acc(B_m) - conf(B_m)|, where B_m are the images with a confidence in
        ((m - 1) / M, m / M], m = 1, ..., M = 15.
        """
        return float(np.nansum(self.images * np.abs(self.accuracy - self.confidence)) / self.images.sum())


def calibration(outcomes: Outcomes, bins: int = BINS) -> Calibration:
    """Sort the images into bins ((m - 1) / bins, m / bins] by their confidence."""
    inner_edges = np.linspace(0, 1, bins + 1)[1:-1]
    of_bin = np.digitize(outcomes.confidences, inner_edges, right=True)
    images = np.bincount(of_bin, minlength=bins)
    correct = outcomes.labels == outcomes.predictions
    means = [
        np.divide(np.bincount(of_bin, values, bins), images, out=np.full(bins, np.nan), where=images > 0)
        for values in (outcomes.confidences, correct)
    ]
    return Calibration(images, *means)


# ---- the metrics ----------------------------------------------------------------------------------------------------


def _accuracy(outcomes: Outcomes) -> float:
    return float(np.mean(outcomes.labels == outcomes.predictions))


def _recalls(outcomes: Outcomes) -> np.ndarray:
    """The recalls of the classes that have images."""
    recalls = recall_per_class(outcomes.labels, outcomes.predictions, outcomes.labels.max() + 1)
    return recalls[~np.isnan(recalls)]


def _macro_f1(outcomes: Outcomes) -> float:
    with_images = np.unique(outcomes.labels)
    f1_score = import_sklearn_metrics("macro_f1").f1_score
    return float(f1_score(outcomes.labels, outcomes.predictions, average="macro", labels=with_images, zero_division=0))


ACCURACY = Metric("accuracy", "share of the images that are predicted correctly", _accuracy)
METRICS = {
    metric.name: metric
    for metric in (
        ACCURACY,
        Metric(
            "balanced_accuracy",
            "mean of the classes' recalls, over the classes that have images",
            lambda outcomes: float(_recalls(outcomes).mean()),
        ),
        Metric("macro_f1", "mean of the classes' F1 scores, over the classes that have images", _macro_f1),
        Metric(
            "worst_class", "lowest recall of a class that has images", lambda outcomes: float(_recalls(outcomes).min())
        ),
        Metric(
            "nll",
            "mean negative log-likelihood of the true class, in nats",
            lambda outcomes: float(outcomes.losses.astype(np.float64).mean()),
            needs=("losses",),
            lower_is_better=True,
            percent=False,
        ),
        Metric(
            "ece",
            f"expected calibration error, {BINS} bins of equal width",
            lambda outcomes: calibration(outcomes).error,
            needs=("predictions", "confidences"),
            lower_is_better=True,
        ),
    )
}


def check_metrics(names: Sequence[str], where: str) -> None:
    """UserError for a name that is no metric, a metric named twice, or one that needs a library that is not installed.

    where: the setting that holds the names, for the message.
    """
    for name, count in Counter(names).items():
        if name not in METRICS:
            raise UserError(f"{where}: {name!r} is no metric. Valid: {listing(METRICS)}.")
        if count > 1:
            raise UserError(f"{where}: {name} is listed {count} times. List each metric once.")
    if "macro_f1" in names:
        import_sklearn_metrics(f"{where}: macro_f1")


def import_sklearn_metrics(what: str) -> ModuleType:
    """sklearn.metrics. UserError if scikit-learn is not installed. what: what needs it, for the message."""
    try:
        from sklearn import metrics
    except ImportError:
        raise not_installed(what, "scikit-learn", "metrics") from None
    return metrics
