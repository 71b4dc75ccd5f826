"""Cells and missing cells against numbers worked out by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from analysis.frames import STATUS
from analysis.statistics import grid, missing_cells, table_cells


def chosen(*runs) -> pd.DataFrame:
    """Runs (algorithm, target, trial_seed, accuracy[, seed])."""
    rows = [("toy", *run[:4], run[4] if len(run) > 4 else 0, f"{run[0]}{run[1]}{run[2]}") for run in runs]
    return pd.DataFrame(rows, columns=["dataset", "algorithm", "target", "trial_seed", "accuracy", "seed", "run_id"])


def status(*runs, domains=("a", "b")) -> pd.DataFrame:
    """Runs (algorithm, target, trial_seed[, changes])."""
    rows = []
    for algorithm, target, trial_seed, *changes in runs:
        row = {"run_id": f"{algorithm}{target}{trial_seed}", "dataset": "toy", "algorithm": algorithm, "target": target}
        row |= {"trial_seed": trial_seed, "seed": 0, "n_targets": 1, "domains": domains, "state": "done"}
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


def test_an_average_takes_only_seeds_with_every_target():
    runs = chosen(("erm", "a", 0, 0.5), ("erm", "b", 0, 0.7), ("erm", "a", 1, 0.9))
    mean, _, n = cell(table_cells(runs, grid(status(("erm", "a", 0))), "last"), "erm", "average")
    assert (mean, n) == (pytest.approx(60.0), 1)


def test_without_a_complete_seed_there_is_no_average():
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
    missing = missing_cells(chosen(), seen, grid(seen))
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
    missing = missing_cells(done, seen, grid(seen))
    found = missing[["algorithm", "target", "trial_seed", "reason"]].values.tolist()
    assert sorted(found) == [
        ["erm", "b", 1, "no such run"],
        ["x", "a", 0, "no such run"],
        ["x", "a", 1, "no such run"],
        ["x", "b", 1, "no such run"],
    ]


def test_runs_with_several_targets_are_no_part_of_the_grid():
    seen = status(("erm", "a", 0), ("pairs", "a+b", 0, {"n_targets": 2}))
    assert set(grid(seen)["algorithm"]) == {"erm"}
    assert set(missing_cells(chosen(), seen, grid(seen))["algorithm"]) == {"erm"}
