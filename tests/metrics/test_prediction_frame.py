"""The frame of predictions: its file, its summary, and what the metrics read from it."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest

from gsdg.metrics import METRICS
from gsdg.metrics.predictions import (
    SUMMARY,
    classes_of,
    confident_errors,
    outcomes_of,
    predictions_frame,
    read_predictions,
    summary,
    summary_text,
    write_predictions,
)
from gsdg.utils.errors import UserError

CLASSES = ["zebra", "dog", "label", "house"]  # not in alphabetical order; one is called as a column is


def part_of(domain: str, part: str, labels: list[int], probabilities: list[list[float]]) -> pd.DataFrame:
    rows = np.array(probabilities, dtype=np.float32)
    files = [f"/data/{domain}/{i}.png" for i in range(len(labels))]
    return predictions_frame(files, domain, part, np.array(labels), rows.argmax(1), rows, CLASSES)


@pytest.fixture
def frame() -> pd.DataFrame:
    """photo out: 2 of 3 correct; sketch out: 1 of 2, with a confident error; photo in: one image."""
    photo = part_of("photo", "out", [0, 0, 1], [[0.7, 0.1, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], [0.1, 0.8, 0.05, 0.05]])
    sketch = part_of("sketch", "out", [2, 1], [[0.01, 0.01, 0.01, 0.97], [0.1, 0.7, 0.1, 0.1]])
    return pd.concat([photo, sketch, part_of("photo", "in", [3], [[0, 0, 0, 1]])], ignore_index=True)


def test_rows_have_names_of_classes_and_a_column_of_probabilities_per_class(frame):
    assert list(frame) == ["file", "domain", "part", "label", "prediction", "p_zebra", "p_dog", "p_label", "p_house"]
    assert frame.iloc[1][["file", "label", "prediction"]].tolist() == ["/data/photo/1.png", "zebra", "dog"]
    assert frame["p_dog"].tolist() == pytest.approx([0.1, 0.6, 0.8, 0.01, 0.7, 0])
    assert classes_of(frame) == CLASSES


def test_the_metrics_read_class_indices_confidences_and_losses_from_it(frame):
    outcomes = outcomes_of(frame)
    assert outcomes.labels.tolist() == [0, 0, 1, 2, 1, 3]
    assert outcomes.predictions.tolist() == [0, 1, 1, 3, 1, 3]
    assert outcomes.confidences.tolist() == pytest.approx([0.7, 0.6, 0.8, 0.97, 0.7, 1])
    assert outcomes.losses.tolist() == pytest.approx([-np.log(p) for p in (0.7, 0.2, 0.8, 0.01, 0.7, 1)])


def test_a_probability_of_zero_has_a_finite_loss():
    outcomes = outcomes_of(part_of("a", "in", [0], [[0, 1, 0, 0]]))
    assert outcomes.losses.tolist() == pytest.approx([87.336], abs=1e-3)


def test_the_file_holds_the_same_frame_with_all_classes_and_is_replaced_at_once(frame, tmp_path):
    path = tmp_path / "predictions.parquet"
    path.write_text("from before")
    write_predictions(frame, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["predictions.parquet"]
    pd.testing.assert_frame_equal(read_predictions(path), frame)
    assert read_predictions(path)["prediction"].cat.categories.tolist() == CLASSES
    assert pd.read_parquet(path)["label"].astype(str).tolist() == frame["label"].astype(str).tolist()


def test_what_is_no_file_of_predictions_is_refused(frame, tmp_path):
    damaged, other = tmp_path / "damaged.parquet", tmp_path / "other.parquet"
    write_predictions(frame, damaged)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    pd.DataFrame({"x": [1]}).to_parquet(other)
    for path, words in {
        tmp_path / "absent.parquet": "cannot read predictions from .*No such file",
        damaged: "is damaged or no Parquet file",
        other: "has no predictions: found the columns x, expected file, domain",
    }.items():
        with pytest.raises(UserError, match=words):
            read_predictions(path)


def test_without_pyarrow_the_message_names_the_extra(frame, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"predictions.parquet needs pyarrow: pip install 'gsdg\[metrics\]'"):
        write_predictions(frame, tmp_path / "p.parquet")


def test_the_summary_has_every_metric_of_each_part_and_names_the_worst_class(frame):
    table = summary(frame)
    assert list(table) == SUMMARY
    assert table[["domain", "part", "images"]].values.tolist() == [
        ["photo", "out", 3],
        ["sketch", "out", 2],
        ["photo", "in", 1],
    ]
    assert table["accuracy"].tolist() == pytest.approx([2 / 3, 1 / 2, 1])
    assert table["balanced_accuracy"].tolist() == pytest.approx([(1 / 2 + 1) / 2, 1 / 2, 1])
    assert table["worst_class_name"].tolist() == ["zebra", "label", "house"]
    of_photo = outcomes_of(frame[:3])
    expected = {name: metric.compute(of_photo) for name, metric in METRICS.items()}
    assert table.loc[0, list(METRICS)].to_dict() == pytest.approx(expected)


def test_the_text_of_the_summary_names_the_worst_domain_of_each_part_with_several(frame):
    lines = summary_text(summary(frame)).splitlines()
    assert lines[0].split()[:5] == ["domain", "part", "images", "accuracy,", "%"]
    assert lines[1].split()[:4] == ["photo", "out", "3", "66.7"]
    assert [line for line in lines if line.startswith("worst domain")] == [
        "worst domain, out: sketch (accuracy 50.0 %)"
    ]


def test_the_most_confident_errors_come_first(frame):
    errors = confident_errors(frame)
    assert errors["probability"].tolist() == pytest.approx([0.97, 0.6])
    assert errors["file"].tolist() == ["/data/sketch/0.png", "/data/photo/1.png"]
    assert len(confident_errors(frame, most=1)) == 1
    assert len(confident_errors(frame[:1])) == 0
