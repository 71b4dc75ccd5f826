"""Each metric against scikit-learn and against numbers worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
from helpers import REPOSITORY

from gsdg.metrics import METRICS, Metric, Outcomes, check_metrics
from gsdg.metrics.definitions import calibration, confusion_matrix, recall_per_class
from gsdg.utils.errors import UserError

CLASSES = 7


def outcomes(seed: int = 0, images: int = 500, absent: tuple[int, ...] = ()) -> tuple[Outcomes, np.ndarray]:
    """(outcomes of random logits that favour the true class, their probabilities); no image is of an absent class."""
    random = np.random.RandomState(seed)
    labels = random.choice([y for y in range(CLASSES) if y not in absent], images)
    logits = random.normal(size=(images, CLASSES)) + 1.5 * np.eye(CLASSES)[labels] * (labels[:, None] + 1) / 3
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    losses = -np.log(probabilities[np.arange(images), labels])
    return Outcomes(labels, probabilities.argmax(1), probabilities.max(1), losses), probabilities


def value(name: str, *arrays: list) -> float:
    """The metric of labels, predictions, and perhaps confidences and losses."""
    return METRICS[name].compute(Outcomes(*map(np.array, arrays)))


@pytest.mark.parametrize("seed", range(3))
def test_every_metric_that_scikit_learn_has_is_scikit_learns(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    of, probabilities = outcomes(seed)
    labels, predictions = of.labels, of.predictions
    expected = {
        "accuracy": metrics.accuracy_score(labels, predictions),
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, predictions),
        "macro_f1": metrics.f1_score(labels, predictions, average="macro"),
        "worst_class": metrics.recall_score(labels, predictions, average=None).min(),
        "nll": metrics.log_loss(labels, probabilities, labels=range(CLASSES)),
    }
    assert METRICS.keys() - expected.keys() == {"ece"}
    assert {name: METRICS[name].compute(of) for name in expected} == pytest.approx(expected, abs=1e-12)
    recalls = metrics.recall_score(labels, predictions, average=None)
    np.testing.assert_allclose(recall_per_class(labels, predictions, CLASSES), recalls)
    assert (confusion_matrix(labels, predictions, CLASSES) == metrics.confusion_matrix(labels, predictions)).all()


def test_a_class_without_images_has_no_recall_and_counts_in_no_mean():
    """As in WILDS. scikit-learn's macro F1 counts class 2, which is predicted once, with F1 = 0."""
    metrics = pytest.importorskip("sklearn.metrics")
    labels, predictions = [0, 0, 0, 1], [0, 0, 2, 1]
    np.testing.assert_equal(recall_per_class(np.array(labels), np.array(predictions), 4), [2 / 3, 1, np.nan, np.nan])
    assert value("balanced_accuracy", labels, predictions) == pytest.approx((2 / 3 + 1) / 2)
    assert value("worst_class", labels, predictions) == pytest.approx(2 / 3)
    assert value("macro_f1", labels, predictions) == pytest.approx((4 / 5 + 1) / 2)
    assert metrics.f1_score(labels, predictions, average="macro") == pytest.approx((4 / 5 + 1 + 0) / 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of class 2
        assert metrics.balanced_accuracy_score(labels, predictions) == pytest.approx((2 / 3 + 1) / 2)


def test_the_confusion_matrix_has_the_true_class_in_its_rows():
    matrix = confusion_matrix(np.array([0, 0, 2]), np.array([1, 1, 0]), 3)
    assert matrix.tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 0]]


def test_the_calibration_error_is_the_mean_gap_of_the_bins_weighted_by_their_images():
    """Bins of width 1/15: (14/15, 1] has confidences 1.0 and 0.95, (7/15, 8/15] has 0.5 twice and 8/15."""
    labels, predictions = [0, 1, 0, 0, 1], [0, 0, 0, 1, 1]
    confidences = [1.0, 0.95, 0.5, 0.5, 8 / 15]
    bins = calibration(Outcomes(np.array(labels), np.array(predictions), np.array(confidences)))
    assert np.flatnonzero(bins.images).tolist() == [7, 14]
    assert bins.images[[7, 14]].tolist() == [3, 2]
    assert bins.confidence[[7, 14]] == pytest.approx([(0.5 + 0.5 + 8 / 15) / 3, 0.975])
    assert bins.accuracy[[7, 14]] == pytest.approx([2 / 3, 1 / 2])
    gaps = 3 * abs(2 / 3 - (1 + 8 / 15) / 3) + 2 * abs(1 / 2 - 0.975)
    assert value("ece", labels, predictions, confidences) == pytest.approx(gaps / 5)
    assert np.isnan(bins.accuracy[0])


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_it_and_0_to_the_first():
    """The bins are ((m - 1) / M, m / M]."""
    for confidence, number in [(0.0, 0), (0.25, 0), (0.2500001, 1), (0.5, 1), (1.0, 3)]:
        bins = calibration(Outcomes(np.array([0]), np.array([0]), np.array([confidence])), bins=4)
        assert bins.images.tolist() == np.eye(4, dtype=int)[number].tolist(), confidence


def test_perfect_calibration_has_no_error_and_full_confidence_that_of_the_errors():
    assert value("ece", [0] * 4, [0, 0, 0, 1], [0.75] * 4) == pytest.approx(0)
    assert value("ece", [0] * 4, [0, 0, 0, 1], [1.0] * 4) == pytest.approx(0.25)


def test_directions_units_and_texts():
    assert [name for name, metric in METRICS.items() if metric.lower_is_better] == ["nll", "ece"]
    assert [name for name, metric in METRICS.items() if not metric.percent] == ["nll"]
    assert [metric.label for metric in METRICS.values()][-2:] == ["nll", "ece, %"]
    assert all(name == metric.name for name, metric in METRICS.items())


@pytest.mark.parametrize(("metric", "upper"), [(METRICS["ece"], 1), (METRICS["nll"], 1e300)])
def test_only_numbers_in_range_are_values(metric: Metric, upper):
    assert all(map(metric.is_valid, (0, 0.0, upper)))
    beyond = 1.001 if upper == 1 else math.inf
    assert not any(map(metric.is_valid, (-0.1, beyond, math.nan, "0.5", None, True, [0.5])))


def test_an_unknown_metric_lists_the_valid_ones_and_a_repeated_one_is_refused():
    check_metrics(list(METRICS), "trainer.metrics")
    with pytest.raises(UserError, match="trainer.metrics: 'f1' is no metric. Valid: accuracy, .*, nll, ece"):
        check_metrics(["accuracy", "f1"], "trainer.metrics")
    with pytest.raises(UserError, match="nll is listed 2 times"):
        check_metrics(["nll", "accuracy", "nll"], "trainer.metrics")


def test_without_scikit_learn_only_macro_f1_is_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    check_metrics([name for name in METRICS if name != "macro_f1"], "trainer.metrics")
    of, _ = outcomes()
    assert all(np.isfinite(metric.compute(of)) for name, metric in METRICS.items() if name != "macro_f1")
    with pytest.raises(UserError, match=r"trainer.metrics: macro_f1 needs scikit-learn: pip install 'gsdg\[metrics\]'"):
        check_metrics(["macro_f1"], "trainer.metrics")


def test_metrics_are_imported_without_torch_and_without_pandas():
    code = "import sys, gsdg.metrics; assert not {'torch', 'pandas', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)
