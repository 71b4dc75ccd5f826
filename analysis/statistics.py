"""Chosen rows -> the cells of a table, and why the others are empty. Pure functions.

Source: DomainBed's table: mean +- population standard deviation / sqrt(runs), in percent; a row's average is the mean
of its cells. Deviation: DomainBed gives an average no error. Here a row's average is taken for each repetition
(trial seed, seed) that has all the row's targets, then mean and standard error over those.
"""

from __future__ import annotations

import re

import pandas as pd

ROW = ["dataset", "algorithm"]
CELL = [*ROW, "target"]
CELLS = ["dataset", "algorithm", "selection", "target", "mean", "se", "n"]
MISSING = [*CELL, "trial_seed", "run_id", "reason"]
AVERAGE = "average"
NO_RUN = "no such run"


def grid(status: pd.DataFrame) -> pd.DataFrame:
    """The cells that single-target runs should fill, in the table's order: columns dataset, algorithm, target.

    The targets are the dataset's domains as its configs name them; where none does, the targets seen.
    """
    single = status[status["n_targets"] == 1]
    cells = []
    for dataset, runs in single.groupby("dataset"):
        seen = sorted(set(runs["target"]), key=_natural)
        for algorithm in sorted(set(runs["algorithm"]), key=_natural):
            named = runs.loc[runs["algorithm"] == algorithm, "domains"]
            domains = list(dict.fromkeys(domain for domains in named for domain in domains))
            cells += [(dataset, algorithm, target) for target in domains or seen]
    return pd.DataFrame(cells, columns=CELL)


def table_cells(chosen: pd.DataFrame, expected: pd.DataFrame, selection: str) -> pd.DataFrame:
    """A row (CELLS) per cell of `expected` and per row's average (target "average"); mean and se in percent.

    n is the number of runs, of an average the number of complete repetitions. n = 0: no mean. n < 2: no se.
    """
    cells = expected.merge(_mean_and_error(chosen, CELL), on=CELL, how="left")
    rows = expected[ROW].drop_duplicates().assign(target=AVERAGE)
    averages = rows.merge(_mean_and_error(_repetitions(chosen, expected), ROW), on=ROW, how="left")
    both = pd.concat([cells, averages], ignore_index=True).assign(selection=selection)
    return both.assign(n=both["n"].fillna(0).astype(int))[CELLS]


def missing_cells(chosen: pd.DataFrame, status: pd.DataFrame, expected: pd.DataFrame) -> pd.DataFrame:
    """Why runs are not in the table, a row (MISSING) each: not done, nothing to choose from, or no such run.

    Every cell of `expected` should have every trial seed seen in its dataset.
    """
    single = status[status["n_targets"] == 1]
    left_out = single[~single["run_id"].isin(chosen["run_id"])]
    reasons = [_reason(run) for run in left_out.to_dict("records")]
    seeds = single[["dataset", "trial_seed"]].drop_duplicates().sort_values("trial_seed")
    wanted = expected.merge(seeds, on="dataset")
    found = wanted.merge(single[[*CELL, "trial_seed"]].drop_duplicates(), how="left", indicator=True)
    absent = found[found["_merge"] == "left_only"].assign(run_id="", reason=NO_RUN)
    return pd.concat([left_out.assign(reason=reasons)[MISSING], absent[MISSING]], ignore_index=True)


def _mean_and_error(values: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Columns `by`, mean, se, n of the accuracies, in percent: population standard deviation / sqrt(n)."""
    groups = values.groupby(by)["accuracy"]
    found = pd.DataFrame({"mean": 100 * groups.mean(), "se": 100 * groups.std(ddof=0), "n": groups.size()})
    found["se"] = (found["se"] / found["n"] ** 0.5).where(found["n"] > 1)
    return found.reset_index()


def _repetitions(chosen: pd.DataFrame, expected: pd.DataFrame) -> pd.DataFrame:
    """The mean over its targets of every (trial seed, seed) that has them all."""
    means = chosen.groupby([*ROW, "trial_seed", "seed"]).agg(accuracy=("accuracy", "mean"), cells=("target", "nunique"))
    wanted = expected.groupby(ROW).agg(wanted=("target", "nunique")).reset_index()
    joined = means.reset_index().merge(wanted, on=ROW)
    return joined[joined["cells"] == joined["wanted"]]


def _reason(run: dict) -> str:
    if run["state"] == "done":
        return "done, but the accuracies that this selection needs are not in its records"
    at = f"step {run['step']}" + (f" of {run['steps']}" if run["state"] != "failed" else "")
    return f"{run['state']} at {at}" + (f": {run['reason']}" if run["reason"] else "")


def _natural(label: str) -> list[str | float]:
    """A sorting key that puts 5 before 10."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", label)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]
