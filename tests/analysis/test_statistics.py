"""Cells and missing cells against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from analysis.frames import STATUS
from analysis.statistics import (
    average_ranks,
    draw_counts,
    find_baselines,
    grid,
    missing_cells,
    over_datasets,
    paired_differences,
    sign_flip_p,
    t_interval,
    table_cells,
)
from gsdg.errors import UserError


def chosen(*runs, dataset="toy") -> pd.DataFrame:
    """Runs (algorithm, target, trial_seed, accuracy[, seed])."""
    rows = [(dataset, *run[:4], run[4] if len(run) > 4 else 0, f"{run[0]}{run[1]}{run[2]}") for run in runs]
    return pd.DataFrame(rows, columns=["dataset", "algorithm", "target", "trial_seed", "accuracy", "seed", "run_id"])


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


def test_a_cell_is_the_mean_and_the_population_standard_error_in_percent():
    runs = chosen(("erm", "a", 0, 0.5), ("erm", "a", 1, 0.6), ("erm", "a", 2, 0.9))
    cells = table_cells(runs, grid(status(("erm", "a", 0), domains=("a",))), "last")
    # deviations from 2/3: -1/6, -1/15, 7/30; their mean square 26/900; / 3 runs
    assert cell(cells, "erm", "a") == pytest.approx((200 / 3, 100 * math.sqrt(26 / 900 / 3), 3))
    assert set(cells["selection"]) == {"last"}


def test_a_single_run_has_no_standard_error():
    cells = table_cells(chosen(("erm", "a", 0, 0.5)), grid(status(("erm", "a", 0), domains=("a",))), "last")
    mean, se, n = cell(cells, "erm", "a")
    assert (mean, n) == (50.0, 1)
    assert math.isnan(se)


def test_the_average_is_over_cells_first_and_its_error_over_seeds():
    runs = chosen(("erm", "a", 0, 0.5), ("erm", "b", 0, 0.7), ("erm", "a", 1, 0.9), ("erm", "b", 1, 0.7))
    cells = table_cells(runs, grid(status(("erm", "a", 0))), "last")
    # seeds: 60 and 80; the population deviation 10 / sqrt(2)
    assert cell(cells, "erm", "average") == pytest.approx((70.0, 10 / math.sqrt(2), 2))


def test_the_average_of_unequal_cells_is_theirs_and_its_error_of_the_seeds_with_every_target():
    runs = chosen(("erm", "a", 0, 0.5), ("erm", "b", 0, 0.7), ("erm", "a", 1, 0.9))
    mean, se, n = cell(table_cells(runs, grid(status(("erm", "a", 0))), "last"), "erm", "average")
    assert (mean, n) == (pytest.approx(70.0), 1)  # cells 70 and 70; one seed has both
    assert math.isnan(se)


def test_the_sample_form_divides_by_one_less():
    runs = chosen(("erm", "a", 0, 0.5), ("erm", "a", 1, 0.7))
    cells = table_cells(runs, grid(status(("erm", "a", 0), domains=("a",))), "last", "sample")
    # deviations 10 and 10; / 1, not / 2; / 2 runs
    assert cell(cells, "erm", "a") == pytest.approx((60.0, math.sqrt(200 / 1 / 2), 2))


def test_without_one_of_its_cells_a_row_has_no_average():
    cells = table_cells(chosen(("erm", "a", 0, 0.5), ("erm", "a", 1, 0.9)), grid(status(("erm", "a", 0))), "last")
    assert cell(cells, "erm", "b")[2] == cell(cells, "erm", "average")[2] == 0
    assert math.isnan(cell(cells, "erm", "average")[0])


def test_several_seeds_of_one_trial_seed_are_several_runs():
    runs = chosen(("erm", "a", 0, 0.5, 0), ("erm", "b", 0, 0.5, 0), ("erm", "a", 0, 0.7, 1), ("erm", "b", 0, 0.7, 1))
    cells = table_cells(runs, grid(status(("erm", "a", 0))), "last")
    assert cell(cells, "erm", "a") == pytest.approx((60.0, 10 / math.sqrt(2), 2))
    assert cell(cells, "erm", "average") == pytest.approx((60.0, 10 / math.sqrt(2), 2))


def test_methods_are_not_mixed():
    runs = chosen(("x (alpha=0.3)", "a", 0, 0.5), ("x (alpha=0.6)", "a", 0, 0.9))
    seen = status(("x (alpha=0.3)", "a", 0), ("x (alpha=0.6)", "a", 0), domains=("a",))
    cells = table_cells(runs, grid(seen), "last")
    assert cell(cells, "x (alpha=0.3)", "a")[::2] == (50.0, 1)
    assert cell(cells, "x (alpha=0.6)", "average")[::2] == (90.0, 1)


def test_the_grid_has_the_datasets_domains_in_their_order_and_numbers_in_theirs():
    cells = grid(status(("x (n=10)", "b", 0), ("x (n=5)", "b", 0), domains=("c", "b", "a")))
    assert list(dict.fromkeys(cells["algorithm"])) == ["x (n=5)", "x (n=10)"]
    assert cells["target"].tolist() == ["c", "b", "a"] * 2


def test_where_the_config_names_no_domains_the_targets_seen_are_the_grid():
    cells = grid(status(("erm", "75", 0), ("erm", "0", 0), ("x", "15", 0), domains=()))
    assert cells[cells["algorithm"] == "x"]["target"].tolist() == ["0", "15", "75"]


def test_every_run_that_is_not_in_the_table_is_listed_with_its_reason():
    seen = status(
        ("erm", "a", 0, {"state": "failed", "step": 4, "reason": "loss is nan"}),
        ("erm", "b", 0, {"state": "running", "step": 4}),
        ("erm", "a", 1, {"state": "dead", "step": 4, "reason": "no heartbeat for 500 s"}),
        ("erm", "b", 1),
    )
    missing = missing_cells(chosen(), seen, grid(seen), "last")
    assert missing["reason"].tolist() == [
        "failed at step 4: loss is nan",
        "running at step 4 of 10",
        "dead at step 4 of 10: no heartbeat for 500 s",
        "done, but the accuracies that this selection needs are not in its records",
    ]
    assert missing["run_id"].tolist() == ["erma0", "ermb0", "erma1", "ermb1"]


def test_a_combination_nobody_ran_is_missing():
    seen = status(("erm", "a", 0), ("erm", "b", 0), ("erm", "a", 1), ("x", "b", 0))
    done = chosen(("erm", "a", 0, 0.5), ("erm", "b", 0, 0.5), ("erm", "a", 1, 0.5), ("x", "b", 0, 0.5))
    missing = missing_cells(done, seen, grid(seen), "last")
    found = missing[["algorithm", "target", "trial_seed", "reason"]].values.tolist()
    assert sorted(found) == [
        ["erm", "b", 1, "no such run"],
        ["x", "a", 0, "no such run"],
        ["x", "a", 1, "no such run"],
        ["x", "b", 1, "no such run"],
    ]


def test_runs_with_several_targets_are_no_part_of_the_grid():
    seen = status(("erm", "a", 0), ("pairs", "a+b", 0))
    assert set(grid(seen)["algorithm"]) == {"erm"}
    assert set(missing_cells(chosen(), seen, grid(seen), "last")["algorithm"]) == {"erm"}


def pairs_missing(*runs) -> list[list]:
    seen = status(*runs, domains=("a", "b", "c"))
    only_a = grid(seen)[lambda cells: cells["target"] == "a"]
    missing = missing_cells(chosen(), seen, only_a, "leave_one_domain_out")
    return missing[["run_id", "reason"]].values.tolist()


def test_a_cell_without_its_pairs_names_the_runs_it_needs():
    assert pairs_missing(("erm", "a", 0), ("erm", "a+b", 0)) == [
        ["erma0", "needs the runs that leave out, beside it, c (no such run)"]
    ]
    running = ("erm", "a+c", 0, {"state": "running", "step": 4})
    assert pairs_missing(("erm", "a", 0), running) == [
        ["erma0", "needs the runs that leave out, beside it, b (no such run), c (erma+c0: running at step 4 of 10)"]
    ]
    assert pairs_missing(("erm", "a", 0), ("erm", "a+b", 0), ("erm", "a+c", 0)) == [
        ["erma0", "done, and so are its pairs, but no step is in the records of all of them"]
    ]


def test_a_pair_of_another_seed_or_method_is_not_the_one_that_is_needed():
    found = pairs_missing(("erm", "a", 0), ("erm", "a+b", 1), ("x", "a+c", 0))
    assert found == [["erma0", "needs the runs that leave out, beside it, b (no such run), c (no such run)"]]


def test_a_draw_that_nobody_ran_is_missing():
    seen = status(("erm", "a", 0), ("erm", "a", 1), ("x", "a", 0), ("x", "a", 1), domains=("a",))
    seen = pd.concat([seen, seen.iloc[:1].assign(hparams_seed=3, run_id="draw3")])
    done = pd.DataFrame({"run_id": list(seen["run_id"])})
    missing = missing_cells(done, seen, grid(seen), "last")
    columns = ["algorithm", "target", "trial_seed", "hparams_seed", "reason"]
    assert missing[columns].values.tolist() == [["erm", "a", 1, 3, "no such run"]]


# ---- all data sets --------------------------------------------------------------------------------------------------


def two_datasets() -> pd.DataFrame:
    made = []
    for dataset, runs in {
        "toy": [("erm", "a", 0, 0.5), ("erm", "b", 0, 0.7), ("x", "a", 0, 0.9), ("x", "b", 0, 0.9)],
        "zoo": [("erm", "a", 0, 0.8), ("erm", "a", 1, 0.9)],
    }.items():
        seen = status(*[run[:3] for run in runs], domains=("a", "b") if dataset == "toy" else ("a",))
        expected = grid(seen.assign(dataset=dataset))
        made.append(table_cells(chosen(*runs, dataset=dataset), expected, "last"))
    return pd.concat(made, ignore_index=True)


def test_the_table_of_all_data_sets_has_their_averages_and_the_mean_of_those():
    cells = over_datasets(two_datasets())
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


def test_the_average_is_the_difference_of_the_tables_averages_whatever_the_number_of_pairs():
    """The issue's case: three pairs on one target, one on the other; pooled, they were +0.5."""
    runs = chosen(
        *((name, "a", seed, 0.80) for name in ("erm", "x") for seed in range(3)),
        ("erm", "b", 0, 0.68), ("x", "b", 0, 0.70),
    )  # fmt: skip
    cells = table_cells(runs, grid(status(("erm", "a", 0), ("x", "a", 0))), "last")
    table = cell(cells, "x", "average")[0] - cell(cells, "erm", "average")[0]
    found = differences(runs).set_index("target").loc["average", "difference"]
    assert (table, found) == (pytest.approx(1.0), pytest.approx(1.0))


@pytest.mark.parametrize("lacking", ["erm", "x"])
def test_where_the_table_has_no_average_the_comparison_has_none(lacking):
    runs = chosen(*((name, target, 0, 0.5) for name in ("erm", "x", "y") for target in "ab"))
    runs = runs[~((runs["algorithm"] == lacking) & (runs["target"] == "b"))]
    found = differences(runs)
    complete = set(found.loc[found["target"] == "average", "algorithm"])
    assert complete == (set() if lacking == "erm" else {"y"})


def test_how_hard_a_target_is_is_no_uncertainty_of_the_average():
    gains = {"a": 0.02, "b": -0.04}
    runs = chosen(
        *(("erm", target, seed, 0.5 + seed / 10) for target in "ab" for seed in range(3)),
        *(("x", target, seed, 0.5 + seed / 10 + gains[target]) for target in "ab" for seed in range(3)),
    )
    average = differences(runs).set_index("target").loc["average"]
    assert average[["difference", "low", "high"]].tolist() == pytest.approx([-1, -1, -1])
    assert average[["better", "n", "p"]].tolist() == [0, 3, 0.25]


def test_equal_averages_are_not_better_by_rounding_noise():
    assert (0.2 - 0.3) + (0.2 - 0.1) > 0  # in floating point
    runs = chosen(("erm", "a", 0, 0.3), ("erm", "b", 0, 0.1), ("x", "a", 0, 0.2), ("x", "b", 0, 0.2))
    average = differences(runs).set_index("target").loc["average"]
    assert (average["better"], average["n"]) == (0, 1)


@pytest.mark.parametrize("other", [(0, 1), (1, 0)])
def test_runs_of_other_seeds_are_no_pair(other):
    trial_seed, seed = other
    runs = chosen(("erm", "a", 0, 0.5, 0), ("x", "a", 0, 0.6, 0), ("x", "a", trial_seed, 0.9, seed))
    found = differences(runs).set_index("target")
    assert found.loc["a", ["difference", "n"]].tolist() == [pytest.approx(10), 1]


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
    found = find_baselines(
        methods(pacs=["erm (lr=1)", "erm+swad (lr=1)", "x"], vlcs=["erm", "erm (lr=1)"], toy=["x"]), "erm"
    )
    assert found == {"pacs": "erm (lr=1)", "vlcs": "erm"}
    several = methods(pacs=["erm (lr=1)", "erm (lr=2)"], toy=["x"])
    assert find_baselines(several, "erm (lr=2)") == {"pacs": "erm (lr=2)"}
    assert find_baselines(several, None) == {"pacs": "erm (lr=1)", "toy": "x"}


def test_a_baseline_that_is_not_there_lists_those_that_are():
    with pytest.raises(UserError, match="'ermm'.*\n  erm\n  x"):
        differences(chosen(("erm", "a", 0, 0.5), ("x", "a", 0, 0.5)), "ermm")


def test_a_name_that_several_methods_have_is_refused_with_what_to_write_instead():
    named = methods(pacs=["erm (model=a)", "erm (model=b)"], vlcs=["erm"])
    with pytest.raises(UserError, match=r"2 methods of pacs:\n  erm \(model=a\)\n  erm \(model=b\)\n.*--baseline 'erm"):
        find_baselines(named, "erm")


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_95_percent_interval_covers_the_true_mean_in_95_percent_of_samples(n):
    """A bootstrap's percentiles cover it in 49 % (n = 2), 74 % (3) and 84 % (5)."""
    random = np.random.default_rng(n)
    intervals = np.array([t_interval(sample) for sample in random.normal(3, 2, size=(4000, n))])
    covered = ((intervals[:, 0] <= 3) & (intervals[:, 1] >= 3)).mean()
    assert covered == pytest.approx(0.95, abs=0.011)  # three standard errors of a share of 4000


def test_one_pair_has_neither_interval_nor_p():
    assert np.isnan([*t_interval(np.array([3.0])), sign_flip_p(np.array([3.0]))]).all()


@pytest.mark.parametrize(
    ("values", "p"),
    [
        ([1, 2], 2 / 4),
        ([1, 2, 3], 2 / 8),
        ([1, 2, -3], 1.0),
        ([1, 1, 1, 1, 1], 2 / 32),
        ([4, 3, -1], 4 / 8),  # as far from 0: 6, 8 and their opposites
        ([0, 0, 0], 1.0),
    ],
)
def test_p_is_the_share_of_signs_that_give_a_mean_as_far_from_zero(values, p):
    assert sign_flip_p(np.array(values, float)) == pytest.approx(p)
    assert sign_flip_p(-np.array(values, float)) == pytest.approx(p)


def test_p_of_many_pairs_is_sampled_and_repeatable():
    values = np.random.default_rng(0).normal(0.3, 1, size=40)
    assert sign_flip_p(values) == sign_flip_p(values)
    assert 0 < sign_flip_p(values) < 1


def test_average_ranks_share_ties_and_count_only_cells_that_all_have():
    cells = pd.DataFrame(
        [
            ("toy", "x", "last", "a", 90.0), ("toy", "y", "last", "a", 80.0), ("toy", "z", "last", "a", 80.0),
            ("zoo", "x", "last", "b", 50.0), ("zoo", "y", "last", "b", 60.0), ("zoo", "z", "last", "b", 70.0),
            ("zoo", "x", "last", "c", 99.0), ("zoo", "y", "last", "c", math.nan), ("zoo", "z", "last", "c", 1.0),
            ("zoo", "x", "last", "average", 1.0), ("zoo", "y", "last", "average", 2.0),
        ],
        columns=["dataset", "algorithm", "selection", "target", "mean"],
    )  # fmt: skip
    # a: 1, 2.5, 2.5; b: 3, 2, 1
    assert average_ranks(cells).values.tolist() == [["z", 1.75, 2], ["x", 2.0, 2], ["y", 2.25, 2]]


def test_means_that_are_printed_alike_share_their_rank():
    rows = [("toy", name, "last", "a", mean) for name, mean in {"x": 80.04, "y": 79.96, "z": 80.0 + 1e-13}.items()]
    cells = pd.DataFrame(rows, columns=["dataset", "algorithm", "selection", "target", "mean"])
    assert set(average_ranks(cells)["rank"]) == {2.0}


def test_without_a_common_cell_there_are_no_ranks():
    rows = [("toy", "x", "last", "a", 90.0), ("toy", "y", "last", "b", 80.0)]
    cells = pd.DataFrame(rows, columns=["dataset", "algorithm", "selection", "target", "mean"])
    assert len(average_ranks(cells)) == 0


def test_draws_are_counted_by_repetition():
    draws = pd.concat([chosen(("erm", "a", 0, 0.5), ("erm", "b", 0, 0.5)), chosen(("erm", "a", 0, 0.6))])
    assert draw_counts(draws)[["target", "draws"]].values.tolist() == [["a", 2], ["b", 1]]
