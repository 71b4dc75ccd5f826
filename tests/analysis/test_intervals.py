"""Interquartile means and bootstrap intervals: numbers by hand, rliable's, and the file that rliable reads."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from analysis_folders import write_evaluated, write_lines
from table_command import printed, refused

stats = pytest.importorskip("scipy.stats")

from gsdg.analysis import intervals  # noqa: E402
from gsdg.analysis.__main__ import main  # noqa: E402
from gsdg.analysis.formats import FORMATS  # noqa: E402
from gsdg.analysis.intervals import (  # noqa: E402
    AGGREGATES,
    interquartile_mean,
    mean,
    median,
    percentile_interval,
    probability_of_improvement,
    resample,
    scores,
)

VALUES = np.array([[0.0, 1.0, 2.0, 100.0], [4.0, 3.0, 6.0, 50.0]])  # [runs, tasks]


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


# ---- aggregates -----------------------------------------------------------------------------------------------------


def test_aggregates_by_hand():
    assert interquartile_mean(VALUES) == pytest.approx((2 + 3 + 4 + 6) / 4)  # of 0 1 | 2 3 4 6 | 50 100
    assert mean(VALUES) == pytest.approx(166 / 8)
    assert median(VALUES) == pytest.approx(3)  # of the tasks' means 2 2 4 75
    for aggregate in AGGREGATES.values():
        assert aggregate(np.array([VALUES, VALUES + 1])).tolist() == pytest.approx(
            [aggregate(VALUES), aggregate(VALUES + 1)]
        )


def test_the_probability_of_improvement_compares_runs_of_one_task_and_ties_count_half():
    better, baseline = np.array([[1.0, 9.0], [3.0, 9.0]]), np.array([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    # task 0: 1 = 1, 3 > 1, 3 > 2 of 6 pairs; task 1: all
    assert probability_of_improvement(better, baseline) == pytest.approx((2.5 / 6 + 1) / 2)
    assert probability_of_improvement(baseline, better) == pytest.approx((3.5 / 6 + 0) / 2)
    assert probability_of_improvement(better, baseline, lower_is_better=True) == pytest.approx((3.5 / 6 + 0) / 2)
    u = [stats.mannwhitneyu(better[:, task], baseline[:, task]).statistic / 6 for task in (0, 1)]
    assert probability_of_improvement(better, baseline) == pytest.approx(np.mean(u))


# ---- the bootstrap --------------------------------------------------------------------------------------------------


def test_the_interval_of_two_runs_is_known():
    """The mean of two draws of 0.8 and 0.9 is 0.8, 0.85, 0.9 with probability 1/4, 1/2, 1/4."""
    resampled = mean(resample(np.array([[0.8], [0.9]]), generator()))
    assert percentile_interval(resampled) == pytest.approx((0.8, 0.9))
    shares = [np.isclose(resampled, value).mean() for value in (0.8, 0.85, 0.9)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25, 975))


def test_a_task_is_drawn_from_its_own_runs_independently_of_the_others():
    resampled = resample(VALUES, generator())
    assert resampled.shape == (intervals.RESAMPLES, 2, 4)
    for task in range(4):
        assert set(np.unique(resampled[..., task])) == set(VALUES[:, task])
    # Whole rows of [[0, 1], [1, 0]] would always have the mean 0.5.
    means = mean(resample(np.array([[0.0, 1.0], [1.0, 0.0]]), generator()))
    assert means.var() == pytest.approx(0.25 / 4, rel=0.05)


def test_the_interval_has_the_width_of_the_population_standard_error():
    values = generator().normal(size=(5, 40))
    low, high = percentile_interval(mean(resample(values, generator())))
    half_width = 1.96 * np.sqrt((values.var(axis=0) / 5).sum()) / 40
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width), abs=0.05 * half_width)


# ---- the runs -------------------------------------------------------------------------------------------------------


def chosen(*runs: tuple[str, str, int, float]) -> pd.DataFrame:
    """Runs (algorithm, target, trial seed, value) of one data set."""
    rows = [("toy", *run, 0) for run in runs]
    return pd.DataFrame(rows, columns=["dataset", "algorithm", "target", "trial_seed", "value", "seed"])


def test_scores_have_a_row_per_run_and_a_column_per_task_that_every_method_has():
    runs = chosen(
        ("x", "b", 0, 0.5), ("x", "a", 1, 0.2), ("x", "a", 0, 0.1), ("x", "c", 0, 0.9),
        ("erm", "b", 7, 0.6), ("erm", "b", 3, 0.7), ("erm", "a", 0, 0.3), ("erm", "a", 1, 0.4),
    )  # fmt: skip
    cells = pd.DataFrame([("toy", name, target) for name in ("erm", "x", "y") for target in "abc"])
    found = scores(runs, cells.set_axis(["dataset", "algorithm", "target"], axis="columns"))
    assert found.tasks == [("toy", "a"), ("toy", "b")]
    assert list(found.of_method) == ["erm", "x"]  # y has no run
    assert found.of_method["erm"].tolist() == [[0.3, 0.7], [0.4, 0.6]]
    assert found.of_method["x"].tolist() == [[0.1, 0.5]]
    assert found.left_out == ["x (1 of 3)"]


# ---- from the command line to the table and the file ----------------------------------------------------------------


def write_two_methods(runs: Path, seeds: int = 3, datasets=("toy", "zoo")) -> None:
    """x is better than erm by 2 points on photo and by 0 on art."""
    for dataset in datasets:
        for target, accuracy, gain in (("photo", 0.8, 0.02), ("art", 0.5, 0.0)):
            for seed in range(seeds):
                write_evaluated(runs, target, seed, accuracy + 0.01 * seed, dataset=dataset)
                write_evaluated(runs, target, seed, accuracy + 0.01 * seed + gain, "x", dataset=dataset)


def table_of(text: str) -> list[list[str]]:
    (block,) = [block for block in text.split("\n\n") if block.startswith("intervals")]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in block.splitlines()]


def test_the_table_has_points_and_intervals_in_percent_and_is_the_same_each_time(tmp_path, capsys):
    write_two_methods(tmp_path)
    text = printed(capsys, tmp_path, "--intervals", "--baseline", "erm")
    title, header, erm, x, *below = table_of(text)
    assert title == ["intervals, training_domain"]
    assert header == ["algorithm", "IQM", "mean", "median", "P(better than erm)", "runs"]
    values = np.array([[0.8, 0.5, 0.8, 0.5]] * 3) + 0.01 * np.arange(3)[:, None]
    for row, array in ((erm, values), (x, values + [0.02, 0, 0.02, 0])):
        drawn = resample(array, generator())
        for cell, aggregate in zip(row[1:4], AGGREGATES.values(), strict=True):
            low, high = percentile_interval(aggregate(drawn))
            assert cell == f"{100 * aggregate(array):.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    assert erm[4:] == ["-", "3"]
    assert x[4].startswith("0.72 [0.")  # photo: 8.5 of 9, art: 4.5 of 9
    # the population deviation of 0, 1, 2 is 0.816; of the mean of 3 runs and 4 tasks 0.236; 1.96 times that is 0.46
    assert numbers(erm[2]) == pytest.approx([66.0, 65.54, 66.46], abs=0.1)
    notes = " ".join(line for cells in below for line in cells)
    assert "over the 4 tasks (data set, target) that every method has" in notes
    assert "drawn anew 10000 times, seed 0" in notes
    assert "warning: only 3 runs per task: intervals are too narrow, the mean's by a factor of 0.82" in notes
    assert text == printed(capsys, tmp_path, "--intervals", "--baseline", "erm")
    assert table_of(printed(capsys, tmp_path, "--intervals"))[1] == ["algorithm", "IQM", "mean", "median", "runs"]


def test_the_runs_of_the_method_and_of_the_baseline_are_drawn_independently(tmp_path, capsys):
    """Drawn together, equal runs would always be improved on with probability 0.5."""
    for seed, accuracy in enumerate((0.4, 0.6)):
        for name in ("erm", "x"):
            write_evaluated(tmp_path, "photo", seed, accuracy, name)
    (x,) = [row for row in table_of(printed(capsys, tmp_path, "--intervals", "--baseline", "erm")) if row[0] == "x"]
    assert x[4] == "0.50 [0.00, 1.00]"


def test_of_a_loss_a_lower_value_is_an_improvement_and_nothing_is_in_percent(tmp_path, capsys):
    write_two_methods(tmp_path / "runs", seeds=1, datasets=["toy"])
    for folder in (tmp_path / "runs").iterdir():
        lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        write_lines(folder / "records.jsonl", [line | {"scores": {"nll": line["accuracy"]}} for line in lines])
    options = ("--metric", "nll", "--selection", "last", "--intervals", "--baseline", "erm")
    assert main([*map(str, (tmp_path / "runs", *options)), "--rliable", str(tmp_path / "s.npz")]) == 0
    output = capsys.readouterr()
    assert table_of(output.out)[3] == ["x", "0.660", "0.660", "0.660", "0.25", "1"]  # worse on photo, equal on art
    assert "nll, as recorded, arrays" in output.err


def test_a_single_run_per_task_has_no_interval(tmp_path, capsys):
    write_two_methods(tmp_path, seeds=1)
    text = printed(capsys, tmp_path, "--intervals", "--baseline", "erm")
    assert table_of(text)[2:4] == [
        ["erm", "65.0", "65.0", "65.0", "-", "1"],
        ["x", "66.0", "66.0", "66.0", "0.75", "1"],
    ]
    assert "warning: a single run per task has no interval" in text


def test_many_runs_need_no_warning_and_unequal_numbers_are_noted(tmp_path, capsys):
    write_two_methods(tmp_path, seeds=10, datasets=["toy"])
    assert "warning" not in printed(capsys, tmp_path, "--intervals")
    write_evaluated(tmp_path, "photo", 10, 0.99)
    text = printed(capsys, tmp_path, "--intervals")
    assert "note: as many runs of each task as of the one with the fewest; left out: erm (1 of 21)" in text


def test_intervals_are_in_every_format_and_on_the_page(tmp_path, capsys):
    write_two_methods(tmp_path / "runs", seeds=2, datasets=["toy"])
    for name in FORMATS:
        assert "stratified bootstrap" in printed(capsys, tmp_path / "runs", "--intervals", "--format", name), name
    assert "without --intervals" in refused(capsys, tmp_path / "runs", "--intervals", "--format", "csv")
    pytest.importorskip("matplotlib")
    printed(capsys, "report", tmp_path / "runs", "--intervals", "-o", tmp_path / "page")
    assert "stratified bootstrap" in (tmp_path / "page" / "index.html").read_text()


def test_what_cannot_be_computed_is_refused(tmp_path, capsys, monkeypatch):
    write_evaluated(tmp_path / "runs", "photo")
    write_evaluated(tmp_path / "runs", "art", algorithm="x")
    for option in (["--intervals"], ["--rliable", tmp_path / "s.npz"]):
        error = refused(capsys, tmp_path / "runs", *option)
        assert "needs a cell (data set, target) in which every method has a result, and found none" in error
        assert "Cells with a result: erm: 1, x: 1\n" in error
    write_evaluated(tmp_path / "waiting", state="running")
    assert "no run has a result yet" in refused(capsys, tmp_path / "waiting", "--intervals")
    monkeypatch.setitem(sys.modules, "scipy", None)
    one = ("--intervals", "--where", "algorithm=erm")
    assert "--intervals needs scipy: pip install 'gsdg[statistics]'" in refused(capsys, tmp_path / "runs", *one)


def test_the_file_has_an_array_per_method_in_the_order_of_the_tasks_that_are_printed(tmp_path, capsys):
    write_two_methods(tmp_path / "runs")
    path = tmp_path / "scores.npz"
    assert main([str(tmp_path / "runs"), "--rliable", str(path), "--format", "csv"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("dataset,algorithm")  # the tables are printed as without the option
    assert f"written: {path}: accuracy, fractions, arrays [runs, tasks]: erm [3, 4], x [3, 4]" in output.err
    assert "its tasks: toy/photo, toy/art, zoo/photo, zoo/art\n" in output.err
    arrays = dict(np.load(path))
    assert list(arrays) == ["erm", "x"]
    assert arrays["erm"] == pytest.approx(np.array([[0.8, 0.5] * 2, [0.81, 0.51] * 2, [0.82, 0.52] * 2]))
    assert arrays["x"] - arrays["erm"] == pytest.approx(np.array([[0.02, 0.0] * 2] * 3))


def test_a_file_of_several_selections_or_in_no_folder_is_refused(tmp_path, capsys):
    write_two_methods(tmp_path / "runs", seeds=1)
    several = ("--rliable", tmp_path / "s.npz", "--selection", "last", "oracle")
    assert "the values of one selection. Give one --selection" in refused(capsys, tmp_path / "runs", *several)
    path = tmp_path / "none" / "s.npz"
    assert f"--rliable {path}: cannot be written: No such file" in refused(capsys, tmp_path / "runs", "--rliable", path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["runs"]


@pytest.mark.slow
def test_rliable_reads_the_file_and_computes_the_same_numbers(tmp_path, capsys):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from rliable import library, metrics
    except Exception as error:  # rliable 1.2.0 needs arch < 8, whose import fails with pandas 3
        pytest.skip(f"rliable cannot be imported: {error}")
    random = np.random.default_rng(1)
    for dataset in ("toy", "zoo"):
        for seed in range(5):
            for target in ("photo", "art"):
                for name in ("erm", "x"):
                    accuracy = float(random.uniform(0.5, 0.9))
                    write_evaluated(tmp_path / "runs", target, seed, accuracy, name, dataset=dataset)
    path = tmp_path / "scores.npz"
    text = printed(capsys, tmp_path / "runs", "--intervals", "--baseline", "erm", "--rliable", path)
    arrays = dict(np.load(path))
    theirs = (metrics.aggregate_iqm, metrics.aggregate_mean, metrics.aggregate_median)
    np.random.seed(0)  # rliable draws from the global generator
    points, bounds = library.get_interval_estimates(
        arrays, lambda values: np.array([aggregate(values) for aggregate in theirs]), reps=10_000
    )
    pair = {"x": (arrays["x"], arrays["erm"])}
    better = library.get_interval_estimates(
        pair, lambda *both: np.array([metrics.probability_of_improvement(*both)]), reps=1000
    )
    rows = table_of(text)[2:4]
    for name, *cells in (row[:4] for row in rows):
        for index, cell in enumerate(cells):
            expected = [points[name][index], *bounds[name][:, index]]
            assert numbers(cell) == pytest.approx([100 * number for number in expected], abs=0.35), (name, index)
    assert numbers(rows[1][4]) == pytest.approx([*better[0]["x"], *better[1]["x"][:, 0]], abs=0.021)


def numbers(cell: str) -> list[float]:
    """`85.0 [83.1, 86.9]` -> [85.0, 83.1, 86.9]"""
    return [float(word.strip("[],")) for word in cell.split()]
