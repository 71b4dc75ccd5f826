"""Cells and missing cells against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from analysis.frames import STATUS
from analysis.statistics import (
    average_ranks,
    bootstrap_interval,
    draw_counts,
    grid,
    missing_cells,
    over_datasets,
    paired_differences,
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


def test_differences_are_taken_on_the_same_target_and_seeds():
    runs = chosen(
        ("erm", "a", 0, 0.5), ("erm", "a", 1, 0.6), ("erm", "b", 0, 0.7),
        ("x", "a", 0, 0.52), ("x", "a", 1, 0.66), ("x", "b", 0, 0.69), ("x", "b", 1, 0.99),
    )  # fmt: skip
    found = paired_differences(runs, "erm").set_index("target")
    assert found["difference"].to_dict() == pytest.approx({"a": (2 + 6) / 2, "b": -1, "average": (2 + 6 - 1) / 3})
    assert found[["better", "n"]].to_dict("index") == {
        "a": {"better": 2, "n": 2},
        "b": {"better": 0, "n": 1},
        "average": {"better": 2, "n": 3},
    }
    assert found.loc["a", ["low", "high"]].tolist() == pytest.approx([2, 6])  # means of two: 2, 4 or 6
    assert found.loc["b", ["low", "high"]].isna().all()
    assert set(found["baseline"]) == {"erm"}


@pytest.mark.parametrize("other", [(0, 1), (1, 0)])
def test_runs_of_other_seeds_are_no_pair(other):
    trial_seed, seed = other
    runs = chosen(("erm", "a", 0, 0.5, 0), ("x", "a", 0, 0.6, 0), ("x", "a", trial_seed, 0.9, seed))
    found = paired_differences(runs, "erm").set_index("target")
    assert found.loc["a", ["difference", "n"]].tolist() == [pytest.approx(10), 1]


def test_selections_are_kept_apart_and_one_without_the_baseline_has_no_rows():
    both = chosen(("erm", "a", 0, 0.5), ("x", "a", 0, 0.6)).assign(selection="last")
    without = chosen(("x", "a", 0, 0.9), ("y", "a", 0, 0.8)).assign(selection="oracle")
    found = paired_differences(pd.concat([both, without]), "erm")
    columns = ["selection", "algorithm", "target", "difference"]
    assert found[columns].values.tolist() == [
        ["last", "x", "a", pytest.approx(10)],
        ["last", "x", "average", pytest.approx(10)],
    ]


def test_a_baseline_that_has_no_results_lists_those_that_have():
    with pytest.raises(UserError, match="'ermm'.*\n  erm\n  x"):
        paired_differences(chosen(("erm", "a", 0, 0.5), ("x", "a", 0, 0.5)), "ermm")


def test_the_bootstrap_interval_is_that_of_the_mean_and_repeatable():
    rng = np.random.default_rng(1)
    values = rng.normal(3, 2, size=400)
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    half = 1.96 * values.std() / 20  # the normal approximation, good at n = 400
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


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


def test_without_a_common_cell_there_are_no_ranks():
    rows = [("toy", "x", "last", "a", 90.0), ("toy", "y", "last", "b", 80.0)]
    cells = pd.DataFrame(rows, columns=["dataset", "algorithm", "selection", "target", "mean"])
    assert len(average_ranks(cells)) == 0


def test_draws_are_counted_by_repetition():
    draws = pd.concat([chosen(("erm", "a", 0, 0.5), ("erm", "b", 0, 0.5)), chosen(("erm", "a", 0, 0.6))])
    assert draw_counts(draws)[["target", "draws"]].values.tolist() == [["a", 2], ["b", 1]]
