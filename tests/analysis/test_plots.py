"""Plots read back from their artists against numbers worked out by hand, and rendered: nothing cut, no overlap."""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("matplotlib")
from helpers import REPOSITORY
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from gsdg.analysis import plots, style
from gsdg.utils.errors import UserError

PACS = ["art_painting", "cartoon", "photo", "sketch"]
DOMAINNET = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
RULES = ["corgrad", "pcgrad", "gradvac", "mgda", "cagrad", "imtl_g"]
RULES += ["aligned_mtl", "upgrad", "dualproj", "nash", "mean", "sum"]
PARTITIONS = ["model", "module", "tensor", "chunk_2", "chunk_5", "chunk", "chunk_20", "filter", "element"]
METHODS = ["erm", "pcgrad", *(f"grad_surgery (alpha={a}, n_parts={n})" for a in (0.3, 0.6) for n in (1, 2, 5, 10, 20))]
MODULES = ["conv1", "bn1", *(f"layer{a}.{b}.{c}" for a in (1, 2, 3, 4) for b in range(4) for c in ("conv1", "bn1"))]
MODULES += [f"layer{a}.{b}.downsample.0" for a in (1, 2, 3, 4) for b in range(6)] + ["head", "fc"]


@pytest.fixture
def ax():
    """Axes of a new figure in the plots' own style."""
    with style.print_style():
        yield style.figure()[1][0, 0]


def records(*rows, target="b") -> pd.DataFrame:
    """Rows (run_id, step, domain, accuracy[, part]) of one method's runs."""
    columns = ["run_id", "step", "domain", "value", "part"]
    frame = pd.DataFrame([row if len(row) == 5 else (*row, "out") for row in rows], columns=columns)
    frame["is_target"] = frame["domain"] == target
    return frame.assign(dataset="toy", algorithm="erm", target=target, trial_seed=0, seed=0, n_targets=1)


def chosen(*rows, columns=("alpha", "n_parts")) -> pd.DataFrame:
    """Rows (*settings, target, trial_seed, accuracy)."""
    frame = pd.DataFrame(rows, columns=[*columns, "target", "trial_seed", "value"])
    return frame.assign(dataset="toy", seed=0, run_id=[f"r{i}" for i in range(len(frame))])


def diagnostics(*rows) -> pd.DataFrame:
    """Rows (algorithm, run_id, step, module, conflict_rate[, level]); 100 steps a run."""
    columns = ["algorithm", "run_id", "step", "module", "conflict_rate", "level"]
    frame = pd.DataFrame([row if len(row) == 6 else (*row, "chunk") for row in rows], columns=columns)
    frame = frame.assign(dataset="toy", target="a", trial_seed=0, steps=100)
    return frame.assign(cosine=-frame["conflict_rate"], removed_norm_ratio=frame["conflict_rate"] / 2)


def lines(ax) -> dict:
    """{label: line}, in order, without the helper lines."""
    return {str(line.get_label()): line for line in ax.lines if not str(line.get_label()).startswith("_")}


def points(line) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def ticks(axis) -> list[str]:
    return [text.get_text() for text in axis.get_ticklabels()]


def vertices(band) -> set[tuple[float, float]]:
    return {(float(x), round(float(y), 6)) for x, y in band.get_paths()[0].vertices if np.isfinite(y)}


def offsets(collection) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in collection.get_offsets()]


def error_bars(container) -> list[tuple[float, float, float]]:
    """(x, low, high) of every bar."""
    segments = [segment for bars in container.lines[2] for segment in bars.get_segments()]
    return [(segment[0][0], segment[0][1], segment[1][1]) for segment in segments if len(segment)]


# accuracy_by_step


def test_a_curve_is_the_mean_over_runs_in_percent_with_a_band_of_the_population_standard_deviation(ax):
    """Of the splits that tables and selection use."""
    rows = [("r", 0, "a", 0.2), ("s", 0, "a", 0.4), ("r", 5, "a", 0.5), ("s", 5, "a", 0.9), ("r", 0, "a", 0.99, "in")]
    rows += [("r", 0, "b", 0.9), ("s", 0, "b", 0.9), ("r", 0, "b", 0.6, "in"), ("s", 0, "b", 0.8, "in")]
    plots.accuracy_by_step(records(*rows), ax)
    assert points(lines(ax)["a (out split)"]) == [(0, pytest.approx(30)), (5, pytest.approx(70))]
    assert points(lines(ax)["b (target, in split)"]) == [(0, pytest.approx(70))]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training step", "accuracy, %")
    assert all(line.get_visible() for line in [*ax.get_xgridlines(), *ax.get_ygridlines()])
    assert [vertices(band) for band in ax.collections] == [
        {(0, 20), (0, 40), (5, 50), (5, 90)},
        {(0, 60), (0, 80)},
    ]


def test_a_single_run_has_no_band_and_the_other_splits_can_be_shown(ax):
    rows = [(*place, part) for place in (("r", 0, "a", 0.2), ("r", 0, "b", 0.9)) for part in ("in", "out")]
    plots.accuracy_by_step(records(*rows), ax, target_part="out", source_part="in")
    assert list(lines(ax)) == ["a (in split)", "b (target, out split)"]
    assert not ax.collections


def test_the_mean_ends_where_one_run_stops_and_the_others_go_on_by_themselves(ax):
    """The issue's case: runs of 80 and 61, of which the first stops, were a curve that falls from 71 to 61."""
    rows = [("good", 0, "a", 0.8), ("bad", 0, "a", 0.61), ("bad", 5, "a", 0.61), ("bad", 9, "a", 0.61)]
    plots.accuracy_by_step(records(*rows, ("good", 0, "b", 0.8, "in")), ax)
    assert points(lines(ax)["a (out split)"]) == [(0, pytest.approx(70.5))]
    (alone,) = [line for line in ax.lines if len(line.get_xdata()) > 1]
    assert points(alone) == [(5, pytest.approx(61)), (9, pytest.approx(61))]
    assert alone.get_label().startswith("_")
    assert alone.get_linewidth() < 1
    assert points(lines(ax)["b (target, in split)"]) == []  # of b, the other run has recorded nothing


def test_domains_keep_their_order_and_the_target_is_named_and_heavier(ax):
    plots.accuracy_by_step(records(*(("r", 0, d, 0.5, "in" if d == "b" else "out") for d in "cba")), ax)
    assert legend(ax) == ["c (out split)", "b (target, in split)", "a (out split)"]
    widths = [line.get_linewidth() for line in lines(ax).values()]
    assert widths[1] > 1.5 * max(widths[0], widths[2])


def test_selected_steps_lie_on_the_targets_accuracy_of_that_run_and_part(ax):
    rows = [("r", 0, "b", 0.1, "in"), ("r", 5, "b", 0.3, "in"), ("s", 5, "b", 0.4, "in"), ("r", 5, "a", 0.8)]
    rows += [("r", 5, "b", 0.9)]
    picked = {"oracle": pd.DataFrame({"run_id": ["r", "s", "other"], "step": [5, 5, 5], "value": [0.9, 0.9, 0.9]})}
    picked["last"] = pd.DataFrame({"run_id": ["r"], "step": [0]})
    picked["none of these runs"] = pd.DataFrame({"run_id": ["other"], "step": [0]})
    plots.accuracy_by_step(records(*rows), ax, {**picked, "nothing": pd.DataFrame()})
    found = {mark.get_label(): mark for mark in ax.collections if not mark.get_label().startswith("_")}
    assert offsets(found["oracle"]) == [(5, pytest.approx(30)), (5, pytest.approx(40))]
    assert offsets(found["last"]) == [(0, pytest.approx(10))]
    assert legend(ax) == ["b (target, in split)", "a (out split)", "oracle", "last"]
    shapes = [mark.get_paths()[0].vertices.tolist() for mark in found.values()]
    assert shapes[0] != shapes[1]


def test_runs_of_several_methods_are_neither_one_curve_nor_one_map(ax):
    mixed = pd.concat([records(("r", 0, "a", 0.5)), records(("s", 0, "a", 0.5)).assign(algorithm="other")])
    with pytest.raises(UserError, match="one algorithm; found: erm, other"):
        plots.accuracy_by_step(mixed, ax)
    with pytest.raises(UserError, match="one algorithm; found: ours, pcgrad"):
        plots.conflict_map(diagnostics(("ours", "r", 0, "z", 0.1), ("pcgrad", "s", 0, "z", 0.1)), ax)


def test_of_many_steps_a_few_carry_a_marker(ax):
    plots.accuracy_by_step(records(*(("r", step, "a", 0.5) for step in range(1000))), ax)
    assert lines(ax)["a (out split)"].get_markevery() == 100


# alpha_n_parts


def test_a_cell_is_the_mean_over_targets_of_their_runs_starred_if_it_has_fewer_runs(ax):
    rows = [(0.3, 5, "a", 0, 0.6), (0.3, 5, "b", 0, 0.8), (0.3, 5, "b", 1, 1.0), (None, None, "a", 0, 0.1)]
    rows += [(0, 5, t, 0, 0.5) for t in "ab"] + [(0, 10, t, 0, 0.25) for t in "ab"]
    plots.alpha_n_parts(chosen(*rows), ax)
    assert ax.images[0].get_array().filled(-1).round(6).tolist() == [[50, 25], [75, -1]]
    assert (ticks(ax.yaxis), ticks(ax.xaxis)) == (["0", "0.3"], ["5", "10"])
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("alpha", "n_parts (* fewer runs)")
    values = {text.get_position(): text.get_text() for text in ax.texts}
    assert values == {(0, 0): "50.0*", (1, 0): "25.0*", (0, 1): "75.0"}


def hatched(ax) -> set[tuple[float, float]]:
    return {patch.get_xy() for patch in ax.patches if isinstance(patch, Rectangle) and patch.get_hatch()}


def test_a_cell_that_lacks_a_target_is_hatched_and_cannot_be_the_best(ax):
    """The issue's case: without the hard target b, alpha 1 looked better than alpha 0."""
    plots.alpha_n_parts(chosen((0, 5, "a", 0, 0.8), (0, 5, "b", 0, 0.4), (1, 5, "a", 0, 0.7)), ax)
    assert ax.images[0].get_array().filled(-1).round(6).tolist() == [[60], [-1]]
    assert [text.get_text() for text in ax.texts] == ["60.0"]
    assert hatched(ax) == {(-0.5, 0.5)}
    assert ax.get_xlabel() == "n_parts (hatched: lacks a target)"
    ax.clear()
    plots.alpha_n_parts(chosen((0, 5, "a", 0, 0.6), (1, 10, "a", 0, 0.5)), ax)  # two combinations are missing
    assert hatched(ax) == {(0.5, -0.5), (-0.5, 0.5)}
    assert ax.get_xlabel() == "n_parts"


def test_settings_sort_as_numbers_even_when_they_are_text_and_as_text_otherwise(ax):
    plots.alpha_n_parts(chosen(*(("log" if n == "10" else "1", n, "a", 0, 0.5) for n in ("10", "5", "20"))), ax)
    assert ticks(ax.xaxis) == ["5", "10", "20"]
    assert ticks(ax.yaxis) == ["1", "log"]


def luminance(colour) -> float:
    rgb = np.asarray(to_rgb(colour))
    return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


def test_the_text_of_every_cell_contrasts_with_its_colour(ax):
    plots.alpha_n_parts(chosen(*((alpha / 10, 5, "a", 0, alpha / 10) for alpha in range(11))), ax)
    image = ax.images[0]
    assert {text.get_color() for text in ax.texts} == {"black", "white"}
    for text in ax.texts:
        pair = sorted([luminance(image.cmap(image.norm(float(text.get_text())))[:3]), luminance(text.get_color())])
        assert (pair[1] + 0.05) / (pair[0] + 0.05) > 4.5


# granularity


def by_rule(*rows, columns=("rule", "partition")) -> pd.DataFrame:
    return chosen(*rows, columns=columns)


def test_a_point_is_the_mean_over_repetitions_of_the_mean_over_targets_with_its_standard_error(ax):
    rows = [("a", 0, 0.2), ("b", 0, 0.4), ("a", 1, 0.6), ("b", 1, 0.8), ("a", 2, 0.4), ("b", 2, 0.6)]
    single = [("pcgrad", "tensor", target, 0, 0.2) for target in "ab"]
    plots.granularity(by_rule(*(("pcgrad", "model", *row) for row in rows), *single), ax)
    (line,) = ax.containers
    assert points(line.lines[0]) == [(0, pytest.approx(50)), (1, pytest.approx(20))]
    error = 100 * np.sqrt(0.08 / 3) / np.sqrt(3)  # repetitions 0.3, 0.7, 0.5
    bars = [bar for bar in error_bars(line) if np.isfinite(bar).all()]  # a single repetition has none
    assert bars == [(0, pytest.approx(50 - error), pytest.approx(50 + error))]


def test_a_repetition_that_lacks_a_target_is_left_out_and_reported(ax):
    rows = [("pcgrad", "model", "a", 0, 0.2), ("pcgrad", "model", "b", 0, 0.4), ("pcgrad", "model", "a", 1, 0.9)]
    rows += [("pcgrad", "model", "a", 1, 0.8), ("pcgrad", "filter", "a", 0, 0.9)]  # two runs of a are not a and b
    plots.granularity(by_rule(*rows), ax)
    assert points(ax.containers[0].lines[0]) == [(0, pytest.approx(30))]
    assert ticks(ax.xaxis) == ["model"]
    assert "(1 left out: a target is missing)" in ax.get_xlabel()


def test_partitions_go_from_coarse_to_fine_unknown_ones_last_or_in_the_given_order(ax):
    known = ["model", "module", "tensor", "chunk_5", "chunk", "chunk(20)", "chunk (50)"]
    known += ["filter", "filter (all)", "element"]
    seen = ["mine", "element", "chunk(20)", "filter", "chunk_5", "tensor", "chunk (50)", "chunk", "other", "module"]
    seen += ["model", "filter (all)"]
    plots.granularity(by_rule(*(("pcgrad", name, "a", 0, 0.5) for name in seen)), ax)
    assert ticks(ax.xaxis) == [*known, "mine", "other"]
    ax.clear()
    rows = [("pcgrad", name, "a", 0, 0.5) for name in ("mine", "model", "filter")]
    plots.granularity(by_rule(*rows), ax, order=["filter", "model"])
    assert ticks(ax.xaxis) == ["filter", "model", "mine"]


def test_chunks_of_different_numbers_are_different_granularities(ax):
    rows = [("pcgrad", "chunk", n, "a", 0, n / 100) for n in (20, 5)] + [("pcgrad", "filter", None, "a", 0, 0.5)]
    plots.granularity(by_rule(*rows, columns=("rule", "partition", "n_parts")), ax)
    assert ticks(ax.xaxis) == ["chunk(5)", "chunk(20)", "filter"]
    assert [y for _, y in points(ax.containers[0].lines[0])] == [5, 20, 50]


def test_rules_are_dodged_and_a_line_skips_what_its_rule_lacks(ax):
    rows = [(rule, name, "a", 0, 0.5) for rule in ("x", "y") for name in ("model", "tensor", "filter")]
    rows = [row for row in rows if row[:2] != ("y", "tensor")]
    plots.granularity(by_rule(*rows), ax)
    first, second = ([x for x, _ in points(line.lines[0])] for line in ax.containers)
    assert np.round(first).tolist() == [0, 1, 2]
    assert np.round(second).tolist() == [0, 2]
    assert 0.02 < second[0] - first[0] < 0.3
    assert legend(ax) == ["x", "y"]


def test_twelve_rules_stay_at_their_granularity(ax):
    partitions(ax, RULES, ["model", "tensor"])
    found = [[x for x, _ in points(line.lines[0])] for line in ax.containers]
    assert [np.round(x).tolist() for x in found] == [[0, 1]] * 12
    assert len({round(x[0], 6) for x in found}) == 12


# by_progress


def test_progress_bins_hold_the_mean_over_modules_steps_and_runs(ax):
    rows = [("ours", "r", 0, "conv", 0.1), ("ours", "r", 0, "fc", 0.3), ("ours", "r", 49, "fc", 0.4)]
    rows += [("ours", "r", 50, "fc", 0.5), ("ours", "r", 99, "fc", 0.9), ("ours", "s", 50, "fc", 0.1)]
    rows += [("ours", "s", 0, "fc", 0.3)]
    rows += [("ours", "r", 0, "conv", 1.0, "filter"), ("pcgrad", "t", 100, "conv", 1.0)]
    plots.by_progress(diagnostics(*rows), ax, bins=2)
    # run r: steps 0.2 and 0.4, then 0.5 and 0.9; run s: 0.3, then 0.1
    assert points(lines(ax)["ours"]) == [(25, pytest.approx(30)), (75, pytest.approx(40))]
    assert points(lines(ax)["pcgrad"]) == [(75, 100)]
    (band,) = ax.collections
    error = 30 / np.sqrt(2)
    assert vertices(band) == {(25, 30), (75, round(40 - error, 6)), (75, round(40 + error, 6))}


def test_runs_of_other_lengths_meet_at_the_same_progress_and_their_mean_ends_with_the_shortest(ax):
    longer = diagnostics(("ours", "s", 500, "conv", 0.6), ("ours", "s", 900, "conv", 0.6)).assign(steps=1000)
    plots.by_progress(pd.concat([diagnostics(("ours", "r", 50, "conv", 0.2)), longer]), ax)
    assert points(lines(ax)["ours"]) == [(55, pytest.approx(40))]


def test_each_statistic_has_its_unit(ax):
    for statistic, value, label in (
        ("conflict_rate", 40, "conflicting pairs, %"),
        ("removed_norm_ratio", 20, "removed norm, %"),
        ("cosine", -0.4, "mean cosine"),
    ):
        ax.clear()
        plots.by_progress(diagnostics(("ours", "r", 0, "conv", 0.4)), ax, statistic)
        assert points(lines(ax)["ours"]) == [(5, pytest.approx(value))]
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("training progress, %", label)


def test_methods_keep_their_order_and_so_their_colours_whatever_order_the_runs_come_in(ax):
    names = ["x (n=10)", "pcgrad", "x (n=5)"]
    plots.by_progress(diagnostics(*((name, name, 0, "conv", 0.4) for name in names)), ax)
    assert list(lines(ax)) == ["pcgrad", "x (n=5)", "x (n=10)"]


def test_beside_a_tall_legend_the_label_is_wrapped_and_a_unit_stays_with_its_word(ax):
    progress(ax, METHODS, "removed_norm_ratio")
    assert ax.get_ylabel() == "removed\nnorm, %"


# conflict_map


def test_the_map_has_the_mean_over_runs_the_first_module_at_the_top(ax):
    rows = [("ours", "r", 0, "z", 0.1), ("ours", "s", 0, "z", 0.3), ("ours", "r", 10, "z", 0.5)]
    rows += [("ours", "r", 0, "a", 0.6), ("ours", "r", 0, "a", 1.0, "filter"), ("ours", "s", 10, "z", 0.5)]
    rows += [("ours", "r", 20, "z", 0.9)]  # not there in the run s: no column
    plots.conflict_map(diagnostics(*rows), ax)
    (mesh,) = ax.collections
    cells = mesh.get_array()
    assert np.ma.filled(cells, -1).round(6).tolist() == [[20, 50], [60, -1]]
    assert mesh.get_coordinates()[0, :, 0].tolist() == [-5, 5, 15]
    assert ticks(ax.yaxis) == ["z", "a"]
    low, high = ax.get_ylim()
    assert low > high  # z, at 0, is above
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0, pytest.approx(60))
    assert ax.figure.axes[1].get_ylabel() == "conflicting pairs, %"


def test_the_colours_start_at_zero_of_cosines_at_the_lowest_and_can_have_a_given_end(ax):
    frame = diagnostics(("ours", "r", 0, "z", 0.6), ("ours", "r", 0, "a", 0.1))
    for options, limits in (({"vmax": 50}, (0, 50)), ({"statistic": "cosine"}, (-0.6, -0.1))):
        ax.clear()
        plots.conflict_map(frame, ax, **options)
        assert (ax.collections[0].norm.vmin, ax.collections[0].norm.vmax) == limits


def test_a_single_step_has_a_column_and_a_pdf_holds_the_map_as_one_image(ax):
    plots.conflict_map(diagnostics(("ours", "r", 7, "z", 0.1)), ax)
    assert ax.collections[0].get_coordinates()[0, :, 0].tolist() == [6.5, 7.5]
    assert ax.collections[0].get_rasterized()


def test_axes_too_narrow_for_a_colour_bar_say_what_the_colour_is():
    fig, axes = style.figure(1, 1)
    fig.set_size_inches(2, 2)
    plots.conflict_map(diagnostics(("ours", "r", 0, "z", 0.1)), axes[0, 0])
    assert fig.axes == [axes[0, 0]]
    assert "colour: conflicting pairs, %" in axes[0, 0].get_xlabel()


# conflict_matrix


def cosines(*rows) -> pd.DataFrame:
    """Rows (run_id, step, domain_a, domain_b, cosine)."""
    frame = pd.DataFrame(rows, columns=["run_id", "step", "domain_a", "domain_b", "cosine"])
    return frame.assign(dataset="toy", algorithm="ours")


def test_the_matrix_has_the_mean_over_runs_in_the_order_of_similarity(ax):
    pytest.importorskip("scipy")
    rows = [("r", 0, "a", "b", -0.5), ("r", 1, "b", "a", -0.7), ("s", 0, "a", "b", 0.2)]  # the runs: -0.6 and 0.2
    rows += [("r", 0, "a", "c", 0.9), ("r", 0, "b", "d", 0.9), ("r", 0, "c", "d", -0.4), ("r", 1, "c", "b", -0.4)]
    plots.conflict_matrix(cosines(*rows), ax)  # a and d have not been seen together
    names = ticks(ax.yaxis)
    assert names in ([*"cabd"], [*"dbac"], [*"acdb"], [*"bdca"], [*"acbd"], [*"dbca"], [*"cadb"], [*"bdac"])
    cells = pd.DataFrame(np.ma.filled(ax.collections[0].get_array(), np.nan), names, names)
    assert cells.loc["a", "b"] == cells.loc["b", "a"] == pytest.approx(-0.2)
    assert np.isnan(cells.loc["a", "d"])
    assert np.isnan(np.diag(cells)).all()
    assert cells.notna().to_numpy().sum() == 10
    assert (ax.collections[0].norm.vmin, ax.collections[0].norm.vmax) == (-0.9, 0.9)
    assert "similar ones together" in ax.get_xlabel()


def test_without_scipy_the_matrix_is_in_the_order_of_the_data_set_and_says_so(ax, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.cluster", None)
    plots.conflict_matrix(cosines(("r", 0, "z", "b", -0.5), ("r", 0, "z", "a", 0.5), ("r", 0, "b", "a", 0.1)), ax)
    assert ticks(ax.yaxis) == ["z", "b", "a"]
    assert "data set's order" in ax.get_xlabel()
    assert "gsdg[statistics]" in ax.get_xlabel()


# paired


def pairs_frame(*rows) -> pd.DataFrame:
    return chosen(*rows, columns=("algorithm",))


def test_pairs_share_target_and_seed_and_the_rest_is_left_out(ax):
    rows = [("erm", "a", 0, 0.5), ("pcgrad", "a", 0, 0.6), ("erm", "a", 1, 0.7), ("pcgrad", "a", 1, 0.6)]
    rows += [("erm", "b", 0, 0.4), ("pcgrad", "b", 0, 0.4), ("erm", "b", 1, 0.9), ("pcgrad", "c", 1, 0.9)]
    plots.paired(pairs_frame(*rows, ("other", "a", 0, 0.1)), ax, "erm", "pcgrad")
    found = {scatter.get_label(): np.round(scatter.get_offsets(), 6).tolist() for scatter in ax.collections}
    assert found == {"a": [[50, 60], [70, 60]], "b": [[40, 40]]}
    assert " ".join(ax.get_title().split()) == "pcgrad better in 1 of 3 pairs, 1 tie"
    assert legend(ax) == ["a", "b"]
    assert ax.get_legend().get_title().get_text() == "target"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("accuracy of erm, %", "accuracy of pcgrad, %")


def test_pairs_of_other_seeds_or_data_sets_are_none(ax):
    erm, other = pairs_frame(("erm", "a", 0, 0.5)), pairs_frame(("pcgrad", "a", 0, 0.6))
    for change in ({"seed": 1}, {"dataset": "other"}, {"trial_seed": 1}, {"target": "b"}):
        ax.clear()
        plots.paired(pd.concat([erm, other.assign(**change)]), ax, "erm", "pcgrad")
        assert "no pairs" in ax.texts[0].get_text()


def test_targets_of_the_same_name_in_two_data_sets_are_distinguished(ax):
    one = pairs_frame(("erm", "a", 0, 0.5), ("pcgrad", "a", 0, 0.6))
    plots.paired(pd.concat([one, one.assign(dataset="other")]), ax, "erm", "pcgrad")
    assert legend(ax) == ["toy a", "other a"]


def test_pairs_have_equal_axes_and_the_diagonal(ax):
    plots.paired(pairs_frame(("erm", "a", 0, 0.2), ("pcgrad", "a", 0, 0.9)), ax, "erm", "pcgrad")
    assert ax.get_aspect() == 1
    assert ax.get_xlim() == ax.get_ylim()
    assert ax.get_xlim()[0] < 20 < 90 < ax.get_xlim()[1]
    assert ax.get_xticks().tolist() == ax.get_yticks().tolist()
    (diagonal,) = ax.lines
    assert points(diagonal) == [(limit, limit) for limit in ax.get_xlim()]


# what all have in common


UNFINISHED = [("pcgrad", "model", "a", 0, 0.5), ("pcgrad", "model", "b", 1, 0.5)]  # no repetition has both targets


def test_a_frame_with_nothing_to_show_gives_axes_that_show_a_message(ax):
    unset = chosen((None, None, "a", 0, 0.5)).assign(rule=None, level=None, part=None, algorithm=None)
    frames = (None, pd.DataFrame(), chosen()[:0], chosen((0, 5, "a", 0, 0.5))[["dataset", "value"]], unset)
    functions = (plots.accuracy_by_step, plots.alpha_n_parts, plots.granularity, plots.by_progress, plots.conflict_map)
    for function in (*functions, plots.conflict_matrix, partial(plots.paired, x="erm", y="pcgrad")):
        for frame in frames:
            ax.clear()
            assert function(frame, ax) is ax
            (text,) = ax.texts
            assert text.get_text().startswith("no"), (function, frame)
            assert not ax.axison
            assert text.get_position() == (0.5, 0.5)


def test_what_is_missing_is_named(ax):
    one_step, one_module = records(("r", 0, "a", 0.5)), diagnostics(("o", "r", 0, "z", 0.1))
    for function, frame, options, message in (
        (plots.by_progress, None, {}, "no diagnostics: run with algorithm.diagnostics=true"),
        (plots.alpha_n_parts, chosen((5, "a", 0, 1.0), columns=("n_parts",)), {}, "no column alpha"),
        (plots.accuracy_by_step, one_step, {"source_part": "in"}, "no accuracies: neither"),
        (plots.conflict_map, one_module, {"level": "row"}, "the granularity row"),
        (plots.by_progress, one_module, {"level": "row"}, "the granularity row"),
        (plots.alpha_n_parts, chosen((None, 5, "a", 0, 1.0)), {}, "no run has a value of alpha"),
        (plots.alpha_n_parts, chosen((None, 5, "a", 0, 1.0), (1, None, "a", 0, 1.0)), {}, "alpha, n_parts"),
        (
            plots.alpha_n_parts,
            chosen((0, 5, "a", 0, 0.8), (1, 5, "b", 0, 0.4)),
            {},
            "no cell has all the targets: a, b",
        ),
        (plots.granularity, by_rule(*UNFINISHED), {}, "no repetition has all the targets: a, b"),
    ):
        ax.clear()
        function(frame, ax, **options)
        assert message in " ".join(ax.texts[0].get_text().split())


def test_series_differ_without_their_colour_and_colours_come_from_okabe_and_ito(ax):
    rows = [(name, name, step, "conv", 0.5) for name in METHODS for step in (0, 50)]
    plots.by_progress(diagnostics(*rows), ax)
    looks = [(line.get_marker(), line.get_linestyle()) for line in lines(ax).values()]
    assert len(set(looks)) == len(METHODS)
    colours = {to_hex(line.get_color()).upper() for line in lines(ax).values()}
    assert len(colours) == 7
    assert colours <= {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}


def test_the_name_that_all_series_share_is_the_legends_title(ax):
    names = [name for name in METHODS if name.startswith("grad")]
    plots.by_progress(diagnostics(*((name, name, 0, "conv", 0.5) for name in names)), ax)
    assert ax.get_legend().get_title().get_text() == "grad_surgery"
    assert legend(ax)[0] == "alpha=0.3, n_parts=1"


def test_a_dollar_in_a_name_begins_no_formula(ax):
    plots.by_progress(diagnostics(("a $ b $ c", "r", 0, "conv", 0.4)), ax)
    assert not any(text.get_parse_math() for text in ax.get_legend().get_texts())


def test_without_matplotlib_the_message_says_how_to_get_it():
    code = """
import sys
sys.modules["matplotlib"] = None
import analysis
from gsdg.utils.errors import UserError
try:
    import gsdg.analysis.plots
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("plots need matplotlib: pip install 'gsdg[plots]'")


def test_neither_pyplot_nor_the_global_settings_nor_torch_are_touched():
    code = """
import sys, matplotlib, pandas
before = matplotlib.rcParams.copy()
from gsdg.analysis import plots, style
fig, axes = style.figure()
frame = pandas.DataFrame({"alpha": [0, 1], "n_parts": [5, 5], "value": [0.5, 0.6]})
plots.alpha_n_parts(frame, axes[0, 0])
assert matplotlib.rcParams.copy() == before
assert not {"matplotlib.pyplot", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


# at 3.4 x 2.6 inches


def curves(ax, domains, runs, steps):
    random = np.random.default_rng(0)
    rows = []
    for run, step, domain, part in itertools.product(range(runs), steps, domains, ("in", "out")):
        accuracy = 0.95 - 0.3 * (domain == domains[-1]) + random.normal(0, 0.05)
        rows.append((f"r{run}", step, domain, float(np.clip(accuracy, 0, 1)), part))
    picked = {}
    for number, name in enumerate(["training_domain", "oracle", "oracle_best", "last"]):
        picked[name] = pd.DataFrame({"run_id": [f"r{run}" for run in range(runs)], "step": steps[-1 - number]})
    return plots.accuracy_by_step(records(*rows, target=domains[-1]), ax, picked)


def grid(ax, alphas, numbers):
    rows = [(a, n, t, s, 0.5 + a / 3 - n / 300) for a in alphas for n in numbers for t in PACS for s in (0, 1)]
    return plots.alpha_n_parts(chosen(*rows[1:]), ax)


def partitions(ax, rules, names):
    rows = [
        (rule, name, target, seed, 0.5 + rules.index(rule) / 50 + seed / 200)
        for rule, name, target, seed in itertools.product(rules, names, PACS, (0, 1, 2))
    ]
    return plots.granularity(by_rule(*rows), ax)


def progress(ax, methods, statistic="conflict_rate"):
    rows = [
        (name, f"{name}{run}", step, "conv1", 0.3 + step / 300 + methods.index(name) / 60 + run / 90)
        for name, run, step in itertools.product(methods, (0, 1), range(0, 100, 5))
    ]
    return plots.by_progress(diagnostics(*rows), ax, statistic)


def heat(ax, modules, steps, statistic="conflict_rate"):
    rows = [("ours", "r", step, module, (i + step / 500) / 99) for i, module in enumerate(modules) for step in steps]
    return plots.conflict_map(diagnostics(*rows), ax, statistic)


def matrix(ax, domains):
    pairs = enumerate(itertools.combinations(domains, 2))
    return plots.conflict_matrix(cosines(*(("r", 0, a, b, np.sin(k)) for k, (a, b) in pairs)), ax)


def scatter(ax, targets, x, y):
    rows = [
        (name, target, seed, 0.5 + i / 20 + seed / 50 + 0.02 * (name == y))
        for name, (i, target), seed in itertools.product((x, y), enumerate(targets), (0, 1, 2))
    ]
    return plots.paired(pairs_frame(*rows), ax, x, y)


DRAWN = {
    "curves": {
        "four domains": lambda ax: curves(ax, PACS, 3, range(0, 5001, 300)),
        "six domains": lambda ax: curves(ax, DOMAINNET, 1, range(0, 15001, 500)),
        "long names": lambda ax: curves(ax, [f"a_domain_with_a_long_name_{i}" for i in range(6)], 2, range(9)),
    },
    "grid": {
        "four alphas": lambda ax: grid(ax, (0, 0.3, 0.6, 1), (1, 5, 10, 20)),
        "eleven alphas": lambda ax: grid(ax, [i / 10 for i in range(11)], (1, 2, 3, 5, 8, 10, 20, 50)),
        "30 alphas": lambda ax: grid(ax, [i / 30 for i in range(30)], (1, 5)),
        "20 n_parts": lambda ax: grid(ax, [i / 10 for i in range(11)], [50 * i for i in range(1, 21)]),
    },
    "granularity": {
        "three rules": lambda ax: partitions(ax, RULES[:3], PARTITIONS),
        "every rule": lambda ax: partitions(ax, RULES, [*PARTITIONS, "groups", "groups of a long, long name"]),
        "20 long names": lambda ax: partitions(ax, RULES[:2], [f"partition number {i:02}" for i in range(20)]),
        "three partitions": lambda ax: partitions(ax, RULES[:2], PARTITIONS[:3]),
    },
    "progress": {
        "two methods": lambda ax: progress(ax, ["grad_surgery", "pcgrad"]),
        "twelve methods": lambda ax: progress(ax, METHODS),
        "one head": lambda ax: progress(ax, METHODS[2:], "removed_norm_ratio"),
        "a name of 99 letters": lambda ax: progress(ax, ["erm", "very " * 19 + "long"]),
    },
    "map": {
        "four modules": lambda ax: heat(ax, ["conv1", "conv2", "conv3", "fc"], range(0, 201, 10)),
        "60 modules x 100 steps": lambda ax: heat(ax, MODULES, range(0, 10000, 100)),
        "cosine": lambda ax: heat(ax, MODULES[:20], range(0, 5001, 100), "cosine"),
    },
    "matrix": {
        "two domains": lambda ax: matrix(ax, PACS[:2]),
        "four domains": lambda ax: matrix(ax, PACS),
        "40 domains": lambda ax: matrix(ax, [f"hospital number {i}" for i in range(40)]),
    },
    "pairs": {
        "four targets": lambda ax: scatter(ax, PACS, "erm", "grad_surgery"),
        "long names": lambda ax: scatter(ax, DOMAINNET, METHODS[4], METHODS[-1]),
    },
    "message": {
        "short": lambda ax: plots.by_progress(None, ax),
        "long names": lambda ax: plots.paired(pairs_frame(("erm", "a", 0, 0.5)), ax, METHODS[4], METHODS[-1]),
    },
}


@pytest.mark.parametrize("plot", DRAWN)
def test_every_label_is_inside_the_figure_readable_and_overlaps_neither_another_nor_the_axes(plot):
    for name, draw in DRAWN[plot].items():
        with style.print_style():
            ax = draw(style.figure()[1][0, 0])
            figure = laid_out(ax.figure)
            texts = visible_texts(figure)
            boxes = [corners(text) for text in texts]
        for text, box in zip(texts, boxes, strict=True):
            assert text.get_fontsize() >= 4.5, (name, text)
            assert (box >= -0.5).all(), f"{name}: {text} is cut"
            assert (box <= [figure.bbox.width + 0.5, figure.bbox.height + 0.5]).all(), f"{name}: {text} is cut"
        for (first, a), (second, b) in itertools.combinations(zip(texts, boxes, strict=True), 2):
            assert apart(a, b), f"{name}: {first} and {second} overlap"
        area = ax.get_window_extent()
        assert area.height / figure.dpi > 0.8, f"{name}: the axes are too low"
        assert area.width / figure.dpi > 1.2, f"{name}: the axes are too narrow"
        for text, box in zip(texts, boxes, strict=True):  # only values of cells lie on the axes
            assert text in ax.texts or apart(box, rectangle(area)), f"{name}: {text} lies on the axes"


def test_every_value_fits_its_cell():
    for name in ("four alphas", "eleven alphas"):
        with style.print_style():
            ax = DRAWN["grid"][name](style.figure()[1][0, 0])
            laid_out(ax.figure)
            rows, columns = ax.images[0].get_array().shape
            assert len(ax.texts) == rows * columns, name
            assert max(text.get_window_extent().width for text in ax.texts) < ax.bbox.width / columns, name
            assert max(text.get_window_extent().height for text in ax.texts) < ax.bbox.height / rows, name


def test_four_plots_fit_one_figure():
    with style.print_style():
        fig, axes = style.figure(2, 2)
        DRAWN["curves"]["four domains"](axes[0, 0])
        DRAWN["granularity"]["three rules"](axes[0, 1])
        DRAWN["map"]["60 modules x 100 steps"](axes[1, 0])
        scatter(axes[1, 1], DOMAINNET, "erm", "grad_surgery")
        boxes = [corners(text) for text in visible_texts(laid_out(fig))]
    assert all(apart(a, b) for a, b in itertools.combinations(boxes, 2))


def laid_out(figure):
    """The figure at 150 dpi, with its layout."""
    figure.set_dpi(150)
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    return figure


def visible_texts(figure) -> list[Text]:
    """All text that is visible; a tick beyond the limits is not."""
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            beyond = [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high or not axes.axison]
            hidden |= {label for tick in beyond for label in (tick.label1, tick.label2)}
            hidden |= {axis.offsetText} | (set() if axes.axison else {axis.label})
    return [text for text in texts if text not in hidden]


def rectangle(box) -> np.ndarray:
    return np.array([[box.x0, box.y0], [box.x1, box.y0], [box.x1, box.y1], [box.x0, box.y1]])


def corners(text: Text) -> np.ndarray:
    """[4, 2] in pixels, of turned text the turned rectangle."""
    angle = text.get_rotation()
    anchor = text.get_transform().transform(text.get_position())
    assert angle == 0 or text.get_rotation_mode() == "anchor"
    text.set_rotation(0)
    flat = rectangle(text.get_window_extent()) - anchor
    text.set_rotation(angle)
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return flat @ np.array([[cos, sin], [-sin, cos]]) + anchor


def apart(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether a line along an edge of one of two rectangles separates them."""
    for box in (a, b):
        for edge in (box[1] - box[0], box[3] - box[0]):
            x, y = a @ edge, b @ edge
            if x.max() <= y.min() + 1e-6 or y.max() <= x.min() + 1e-6:
                return True
    return False
