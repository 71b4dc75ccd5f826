"""Cells and missing cells against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from gsdg.analysis import statistics
from gsdg.analysis.read.frames import STATUS
from gsdg.analysis.statistics import (
    NOISE,
    average_ranks,
    draw_counts,
    expected_cells,
    find_baselines,
    missing_cells,
    over_datasets,
    paired_differences,
    sign_flip_p,
    t_interval,
    table_cells,
)
from gsdg.metrics import ACCURACY
from gsdg.utils.errors import UserError


def chosen(*runs, dataset="toy") -> pd.DataFrame:
    """Runs (algorithm, target, trial_seed, accuracy[, seed])."""
    rows = [(dataset, *run[:4], run[4] if len(run) > 4 else 0, f"{run[0]}{run[1]}{run[2]}") for run in runs]
    return pd.DataFrame(rows, columns=["dataset", "algorithm", "target", "trial_seed", "value", "seed", "run_id"])


def status(*runs, domains=("a", "b")) -> pd.DataFrame:
    """Runs (algorithm, target, trial_seed[, changes])."""
    rows = []
    for algorithm, target, trial_seed, *changes in runs:
        row = {"run_id": f"{algorithm}{target}{trial_seed}", "dataset": "toy", "algorithm": algorithm, "target": target}
        row |= {"trial_seed": trial_seed, "seed": 0, "hparams_seed": 0, "domains": domains, "state": "done"}
        row |= {"n_targets": len(target.split("+")), "targets": tuple(target.split("+"))}
        rows.append(row | {"step": 10, "steps": 10, "reason": ""} | (changes[0] if changes else {}))
    return pd.DataFrame(rows, columns=STATUS)


def cell(cells: pd.DataFrame, algorithm: str, target: str) -> tuple[float, float, int]:
    (row,) = cells[(cells["algorithm"] == algorithm) & (cells["target"] == target)].itertuples()
    return row.mean, row.se, row.n


def cells_of(runs: pd.DataFrame, domains=("a", "b"), error: str = "population") -> pd.DataFrame:
    """The cells of one data set's runs where every method should have all `domains`."""
    seen = status(*((name, "a", 0) for name in runs["algorithm"].unique()), domains=domains)
    expected = expected_cells(seen.assign(dataset=runs["dataset"].iloc[0]))
    return table_cells(runs, expected, "last", error)


def test_a_cell_is_the_mean_and_the_standard_error_in_percent_of_the_population_or_sample_form():
    cells = cells_of(chosen(("erm", "a", 0, 0.5), ("erm", "a", 1, 0.6), ("erm", "a", 2, 0.9)), ("a",))
    # deviations from 2/3: -1/6, -1/15, 7/30; their mean square 26/900; / 3 runs
    assert cell(cells, "erm", "a") == pytest.approx((200 / 3, 100 * math.sqrt(26 / 900 / 3), 3))
    assert set(cells["selection"]) == {"last"}
    sample = cells_of(chosen(("erm", "a", 0, 0.5), ("erm", "a", 1, 0.7)), ("a",), "sample")
    # deviations 10 and 10; / 1, not / 2; / 2 runs
    assert cell(sample, "erm", "a") == pytest.approx((60.0, math.sqrt(200 / 1 / 2), 2))
    mean, se, n = cell(cells_of(chosen(("erm", "a", 0, 0.5)), ("a",)), "erm", "a")
    assert (mean, n) == (50.0, 1)
    assert math.isnan(se)


def test_the_average_is_over_cells_first_and_its_error_over_the_seeds_with_every_target():
    runs = chosen(("erm", "a", 0, 0.5), ("erm", "b", 0, 0.7), ("erm", "a", 1, 0.9), ("erm", "b", 1, 0.7))
    # seeds: 60 and 80; the population deviation 10 / sqrt(2)
    assert cell(cells_of(runs), "erm", "average") == pytest.approx((70.0, 10 / math.sqrt(2), 2))
    mean, se, n = cell(cells_of(runs[:3]), "erm", "average")
    assert (mean, n) == (pytest.approx(70.0), 1)  # cells 70 and 70; one seed has both
    assert math.isnan(se)


def test_without_one_of_its_cells_a_row_has_no_average():
    cells = cells_of(chosen(("erm", "a", 0, 0.5), ("erm", "a", 1, 0.9)))
    assert cell(cells, "erm", "b")[2] == cell(cells, "erm", "average")[2] == 0
    assert math.isnan(cell(cells, "erm", "average")[0])


def test_several_seeds_of_one_trial_seed_are_several_runs():
    runs = chosen(("erm", "a", 0, 0.5, 0), ("erm", "b", 0, 0.5, 0), ("erm", "a", 0, 0.7, 1), ("erm", "b", 0, 0.7, 1))
    for target in ("a", "average"):
        assert cell(cells_of(runs), "erm", target) == pytest.approx((60.0, 10 / math.sqrt(2), 2)), target


def test_the_grid_has_the_datasets_domains_in_their_order_or_the_targets_seen_and_numbers_in_theirs():
    cells = expected_cells(status(("x (n=10)", "b", 0), ("x (n=5)", "b", 0), domains=("c", "b", "a")))
    assert list(dict.fromkeys(cells["algorithm"])) == ["x (n=5)", "x (n=10)"]
    assert cells["target"].tolist() == ["c", "b", "a"] * 2
    cells = expected_cells(status(("erm", "75", 0), ("erm", "0", 0), ("x", "15", 0), domains=()))
    assert cells[cells["algorithm"] == "x"]["target"].tolist() == ["0", "15", "75"]


def test_every_run_that_is_not_in_the_table_is_listed_with_its_reason():
    seen = status(
        ("erm", "a", 0, {"state": "failed", "step": 4, "reason": "loss is nan"}),
        ("erm", "b", 0, {"state": "running", "step": 4}),
        ("erm", "a", 1, {"state": "dead", "step": 4, "reason": "no heartbeat for 500 s"}),
        ("erm", "b", 1),
    )
    missing = missing_cells(chosen(), seen, expected_cells(seen), "last")
    assert missing["reason"].tolist() == [
        "failed at step 4: loss is nan",
        "running at step 4 of 10",
        "dead at step 4 of 10: no heartbeat for 500 s",
        "done, but the accuracies that this selection needs are not in its records",
    ]
    assert missing["run_id"].tolist() == ["erma0", "ermb0", "erma1", "ermb1"]


def test_a_combination_that_was_not_run_is_missing_and_runs_with_several_targets_are_no_part_of_the_grid():
    runs = [("erm", "a", 0), ("erm", "b", 0), ("erm", "a", 1), ("x", "b", 0)]
    seen = status(*runs, ("pairs", "a+b", 0))
    missing = missing_cells(chosen(*((*run, 0.5) for run in runs)), seen, expected_cells(seen), "last")
    assert sorted(missing[["algorithm", "target", "trial_seed", "reason"]].values.tolist()) == [
        ["erm", "b", 1, "no such run"],
        ["x", "a", 0, "no such run"],
        ["x", "a", 1, "no such run"],
        ["x", "b", 1, "no such run"],
    ]


def test_a_draw_that_was_not_run_is_missing():
    seen = status(("erm", "a", 0), ("erm", "a", 1), ("x", "a", 0), ("x", "a", 1), domains=("a",))
    seen = pd.concat([seen, seen.iloc[:1].assign(hparams_seed=3, run_id="draw3")])
    missing = missing_cells(seen[["run_id"]], seen, expected_cells(seen), "last")
    columns = ["algorithm", "target", "trial_seed", "hparams_seed", "reason"]
    assert missing[columns].values.tolist() == [["erm", "a", 1, 3, "no such run"]]


def pairs_missing(*runs) -> list[list]:
    seen = status(*runs, domains=("a", "b", "c"))
    only_a = expected_cells(seen)[lambda cells: cells["target"] == "a"]
    missing = missing_cells(chosen(), seen, only_a, "leave_one_domain_out")
    return missing[["run_id", "reason"]].values.tolist()


def test_a_cell_without_its_pairs_names_the_runs_it_needs():
    single, pair = ("erm", "a", 0), ("erm", "a+b", 0)
    running = ("erm", "a+c", 0, {"state": "running", "step": 4})
    no_step = "done, as are the runs that also leave out another domain, but they have no recorded step in common"
    needs = "needs the runs that also leave out"
    for pairs, reason in (
        ([pair], f"{needs} c (no such run)"),
        ([running], f"{needs} b (no such run), c (erma+c0: running at step 4 of 10)"),
        ([pair, ("erm", "a+c", 0)], no_step),
        ([("erm", "a+b", 1), ("x", "a+c", 0)], f"{needs} b (no such run), c (no such run)"),  # another seed or method
    ):
        assert pairs_missing(single, *pairs) == [["erma0", reason]]


# ---- all data sets --------------------------------------------------------------------------------------------------


def test_the_table_of_all_data_sets_has_their_averages_and_the_mean_of_those():
    toy = chosen(("erm", "a", 0, 0.5), ("erm", "b", 0, 0.7), ("x", "a", 0, 0.9), ("x", "b", 0, 0.9))
    zoo = chosen(("erm", "a", 0, 0.8), ("erm", "a", 1, 0.9), dataset="zoo")
    cells = over_datasets(pd.concat([cells_of(toy), cells_of(zoo, ("a",))], ignore_index=True))
    assert cell(cells, "erm", "toy")[::2] == (60.0, 1)
    assert cell(cells, "erm", "zoo") == pytest.approx((85.0, 5 / math.sqrt(2), 2))
    mean, se, n = cell(cells, "erm", "average")
    assert (mean, n) == (pytest.approx(72.5), 1)
    assert math.isnan(se)
    assert cell(cells, "x", "zoo")[2] == 0
    assert math.isnan(cell(cells, "x", "average")[0])


# ---- comparing ------------------------------------------------------------------------------------------------------


def differences(runs: pd.DataFrame, baseline: str = "erm", targets=("a", "b")) -> pd.DataFrame:
    """`paired_differences` where every method should have all the targets."""
    rows = runs[["dataset", "algorithm"]].drop_duplicates()
    return paired_differences(runs, rows.merge(pd.DataFrame({"target": targets}), how="cross"), baseline)


def test_differences_are_taken_on_the_same_target_and_seeds_and_their_average_is_over_cells():
    runs = chosen(
        ("erm", "a", 0, 0.5), ("erm", "a", 1, 0.6), ("erm", "b", 0, 0.7),
        ("x", "a", 0, 0.52), ("x", "a", 1, 0.66), ("x", "b", 0, 0.69), ("x", "b", 1, 0.99),
    )  # fmt: skip
    found = differences(runs).set_index("target")
    assert found["difference"].to_dict() == pytest.approx({"a": (2 + 6) / 2, "b": -1, "average": (4 - 1) / 2})
    assert found[["better", "n"]].to_dict("index") == {
        "a": {"better": 2, "n": 2},
        "b": {"better": 0, "n": 1},
        "average": {"better": 1, "n": 1},  # one repetition has both targets: (2 - 1) / 2
    }
    # the standard deviation of 2 and 6 is 2 sqrt(2), its error 2, and t(1) at 97.5 % is 12.706
    assert found.loc["a", ["low", "high"]].tolist() == pytest.approx([4 - 25.412, 4 + 25.412], abs=1e-3)
    assert found.loc[["b", "average"], ["low", "high", "p"]].isna().all(axis=None)
    assert set(found["baseline"]) == {"erm"}


def test_where_the_table_has_no_average_the_comparison_has_none():
    runs = chosen(*((name, target, 0, 0.5) for name in ("erm", "x", "y") for target in "ab"))
    for lacking, complete in (("erm", set()), ("x", {"y"})):
        rows = differences(runs[~((runs["algorithm"] == lacking) & (runs["target"] == "b"))])
        assert set(rows.loc[rows["target"] == "average", "algorithm"]) == complete, lacking


def test_a_difference_as_small_as_the_noise_of_means_is_not_better():
    assert (0.2 - 0.3) + (0.2 - 0.1) > 0  # in floating point
    runs = chosen(("erm", "a", 0, 0.3), ("erm", "b", 0, 0.1), ("x", "a", 0, 0.2), ("x", "b", 0, 0.2))
    average = differences(runs).set_index("target").loc["average"]
    assert (average["better"], average["n"]) == (0, 1)
    for values, better in (([0.0, NOISE, -NOISE], 0), ([2 * NOISE, NOISE], 1)):
        row = statistics._difference_row(["toy", "x", "erm"], "a", np.array(values), 0.0, ACCURACY)
        assert row[-2:] == [better, len(values)]


def test_runs_of_other_seeds_are_no_pair():
    for trial_seed, seed in ((0, 1), (1, 0)):
        runs = chosen(("erm", "a", 0, 0.5, 0), ("x", "a", 0, 0.6, 0), ("x", "a", trial_seed, 0.9, seed))
        row = differences(runs).set_index("target").loc["a", ["difference", "n"]]
        assert row.tolist() == [pytest.approx(10), 1]


def test_selections_are_kept_apart_and_one_without_the_baseline_has_no_rows():
    both = chosen(("erm", "a", 0, 0.5), ("x", "a", 0, 0.6)).assign(selection="last")
    without = chosen(("x", "a", 0, 0.9), ("y", "a", 0, 0.8)).assign(selection="oracle")
    found = differences(pd.concat([both, without]), targets=["a"])
    columns = ["selection", "algorithm", "target", "difference"]
    assert found[columns].values.tolist() == [
        ["last", "x", "a", pytest.approx(10)],
        ["last", "x", "average", pytest.approx(10)],
    ]


def methods(**datasets) -> pd.DataFrame:
    """{data set: its methods} as a frame."""
    rows = [(dataset, name) for dataset, names in datasets.items() for name in names]
    return pd.DataFrame(rows, columns=["dataset", "algorithm"])


def test_a_baseline_is_a_label_or_else_an_algorithms_name_in_every_data_set_by_itself():
    labels = methods(pacs=["erm (lr=1)", "erm+swad (lr=1)", "x"], vlcs=["erm", "erm (lr=1)"], toy=["x"])
    assert find_baselines(labels, "erm") == {"pacs": "erm (lr=1)", "vlcs": "erm"}
    several = methods(pacs=["erm (lr=1)", "erm (lr=2)"], toy=["x"])
    assert find_baselines(several, "erm (lr=2)") == {"pacs": "erm (lr=2)"}
    assert find_baselines(several, None) == {"pacs": "erm (lr=1)", "toy": "x"}


def test_a_baseline_that_is_not_there_or_a_name_of_several_methods_lists_what_to_write_instead():
    with pytest.raises(UserError, match="'ermm'.*\n  erm\n  x"):
        differences(chosen(("erm", "a", 0, 0.5), ("x", "a", 0, 0.5)), "ermm")
    named = methods(pacs=["erm (model=a)", "erm (model=b)"], vlcs=["erm"])
    with pytest.raises(UserError, match=r"2 methods of pacs:\n  erm \(model=a\)\n  erm \(model=b\)\n.*--baseline 'erm"):
        find_baselines(named, "erm")


def test_the_interval_is_students_95_percent_interval_of_the_mean():
    """A bootstrap's percentiles cover the mean in 49 % (n = 2), 74 % (3) and 84 % (5) of samples."""
    for values, t in (([1, 4], 12.7062), ([1, 2, 6], 4.3027), ([1, 2, 6, 7, 9], 2.7764)):  # t(n - 1) at 97.5 %
        half_width = t * np.std(values, ddof=1) / math.sqrt(len(values))
        expected = (np.mean(values) - half_width, np.mean(values) + half_width)
        assert t_interval(np.array(values, float)) == pytest.approx(expected, abs=1e-3), values
    assert np.isnan(t_interval(np.array([3.0]))).all()


def test_p_is_the_share_of_signs_that_give_a_mean_as_far_from_zero():
    for values, p in (
        ([1, 2], 2 / 4),
        ([1, 2, 3], 2 / 8),
        ([1, 2, -3], 1.0),
        ([1, 1, 1, 1, 1], 2 / 32),
        ([4, 3, -1], 4 / 8),  # as far from 0: 6, 8 and their opposites
        ([0, 0, 0], 1.0),
    ):
        assert sign_flip_p(np.array(values, float)) == pytest.approx(p), values
        assert sign_flip_p(-np.array(values, float)) == pytest.approx(p), values
    assert math.isnan(sign_flip_p(np.array([3.0])))


def test_p_of_many_pairs_is_sampled_and_repeatable():
    values = np.random.default_rng(0).normal(0.3, 1, size=40)
    assert 0 < sign_flip_p(values) == sign_flip_p(values) < 1


def ranks(*cells: tuple) -> list[list]:
    """`average_ranks` of cells (dataset, algorithm, target, mean)."""
    frame = pd.DataFrame(cells, columns=["dataset", "algorithm", "target", "mean"]).assign(selection="last")
    return average_ranks(frame).values.tolist()


def test_average_ranks_share_ties_and_count_only_cells_that_all_have():
    assert ranks(
        ("toy", "x", "a", 90.0), ("toy", "y", "a", 80.0), ("toy", "z", "a", 80.0),  # 1, 2.5, 2.5
        ("zoo", "x", "b", 50.0), ("zoo", "y", "b", 60.0), ("zoo", "z", "b", 70.0),  # 3, 2, 1
        ("zoo", "x", "c", 99.0), ("zoo", "y", "c", math.nan), ("zoo", "z", "c", 1.0),
        ("zoo", "x", "average", 1.0), ("zoo", "y", "average", 2.0),
    ) == [["z", 1.75, 2], ["x", 2.0, 2], ["y", 2.25, 2]]  # fmt: skip
    printed_alike = ranks(("toy", "x", "a", 80.04), ("toy", "y", "a", 79.96), ("toy", "z", "a", 80 + 1e-13))
    assert {rank for _, rank, _ in printed_alike} == {2.0}
    assert ranks(("toy", "x", "a", 90.0), ("toy", "y", "b", 80.0)) == []  # no common cell


def test_draws_are_counted_by_repetition():
    draws = pd.concat([chosen(("erm", "a", 0, 0.5), ("erm", "b", 0, 0.5)), chosen(("erm", "a", 0, 0.6))])
    assert draw_counts(draws)[["target", "draws"]].values.tolist() == [["a", 2], ["b", 1]]
