"""Chosen rows -> the numbers of a table, why some are missing, and how methods compare. Pure functions, in percent.

Source: DomainBed's table: mean +- population standard deviation / sqrt(runs); a row's average is the mean of its cells.
Deviation: DomainBed gives that average no error. Here its error is that of the repetitions' averages: of every
repetition (trial seed, seed) that has all the row's targets.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from types import ModuleType

import numpy as np
import pandas as pd

from analysis.labels import natural
from analysis.selection import DRAW, REPETITION
from gsdg.errors import UserError

ROW = ["dataset", "algorithm"]
CELL = [*ROW, "target"]
PAIR = ["dataset", "target", "trial_seed", "seed"]  # what two methods' runs share that are compared
CELLS = ["dataset", "algorithm", "selection", "target", "mean", "se", "n"]
MISSING = [*CELL, "trial_seed", "hparams_seed", "run_id", "reason"]
DIFFERENCES = [*CELL, "baseline", "difference", "low", "high", "p", "better", "n"]
RANKS = ["algorithm", "rank", "cells"]
AVERAGE = "average"
NO_RUN = "no such run"
ERRORS = {"population": 0, "sample": 1}  # the standard deviation's missing degrees of freedom
CONFIDENCE = 0.95
FLIPS = 2**14  # of the signs of n differences: all of them up to n = 14, a random sample beyond
NOISE = 1e-9  # percentage points: what the mean of equal accuracies may differ by


def grid(status: pd.DataFrame) -> pd.DataFrame:
    """The cells that single-target runs should fill, in the table's order: columns dataset, algorithm, target.

    The targets are the dataset's domains as its configs name them; where none does, the targets seen.
    """
    single = status[status["n_targets"] == 1]
    cells = []
    for dataset, runs in single.groupby("dataset"):
        seen = sorted(set(runs["target"]), key=natural)
        for algorithm in sorted(set(runs["algorithm"]), key=natural):
            named = runs.loc[runs["algorithm"] == algorithm, "domains"]
            domains = list(dict.fromkeys(domain for domains in named for domain in domains))
            cells += [(dataset, algorithm, target) for target in domains or seen]
    return pd.DataFrame(cells, columns=CELL)


def table_cells(
    chosen: pd.DataFrame, expected: pd.DataFrame, selection: str, error: str = "population"
) -> pd.DataFrame:
    """A row (CELLS) per cell of `expected` and per row's average (target "average"); mean and se in percent.

    n is the number of runs, of an average the number of complete repetitions. A cell without a run has no mean, nor has
    its row's average. n < 2: no se. error: population (DomainBed's) or sample standard deviation, over sqrt(n).
    """
    cells = expected.merge(_mean_and_error(chosen, CELL, error), on=CELL, how="left")
    rows = cells.groupby(ROW, sort=False)["mean"].agg(lambda means: means.mean(skipna=False)).reset_index()
    errors = _mean_and_error(_repetitions(chosen, expected), ROW, error).drop(columns="mean")
    averages = rows.merge(errors, on=ROW, how="left").assign(target=AVERAGE)
    both = pd.concat([cells, averages], ignore_index=True).assign(selection=selection)
    return both.assign(n=both["n"].fillna(0).astype(int))[CELLS]


def over_datasets(cells: pd.DataFrame) -> pd.DataFrame:
    """The averages of `cells` as a table of their own: dataset "all", the data sets as targets, their mean as average.

    A row that lacks a data set has no average. The mean over data sets has no error: their repetitions are not paired.
    """
    averages = cells[cells["target"] == AVERAGE].assign(target=lambda rows: rows["dataset"], dataset="all")
    datasets, row = list(dict.fromkeys(averages["target"])), ["selection", "algorithm"]
    rows = averages.drop_duplicates(row)[row]
    every = rows.merge(pd.DataFrame({"target": datasets}), how="cross")
    whole = every.merge(averages.drop(columns="dataset"), on=[*row, "target"], how="left")
    means = whole.groupby(row, sort=False)["mean"].agg(lambda means: means.mean(skipna=False)).reset_index()
    smallest = whole.groupby(row, sort=False)["n"].min().fillna(0).reset_index()
    last = means.merge(smallest, on=row).assign(target=AVERAGE, se=float("nan"))
    both = pd.concat([whole, last], ignore_index=True).assign(dataset="all")
    return both.assign(n=both["n"].fillna(0).astype(int))[CELLS]


def printed(mean: float) -> str:
    """A mean as the tables show it. What they mark and rank is compared as printed: readers see nothing finer."""
    return f"{mean:.1f}"


def paired_differences(chosen: pd.DataFrame, expected: pd.DataFrame, baseline: str | None = None) -> pd.DataFrame:
    """Accuracy minus the baseline's, in percentage points: a row (DIFFERENCES) a cell and a row's average.

    A cell: difference is the mean of the n pairs of the same trial seed and seed, [low, high] is their `t_interval`, p
    their `sign_flip_p`, better the number of pairs above 0. An average is the mean of the row's cells, as in the table,
    and has no row where a cell of `expected` (columns CELL) has no pair. Its interval, p, better and n are over the
    repetitions (trial seed, seed) that have every target, each the mean of its targets: how much harder one target is
    than another says nothing of how uncertain the mean is.

    A column `selection` of `chosen` keeps selections apart, and stands first then. UserError if `baseline` names no
    method of `expected`, or several; no rows where it has no results.
    """
    import_scipy_stats()  # before anything is computed
    by = [column for column in chosen if column == "selection"]
    baselines = chosen["dataset"].map(find_baselines(expected, baseline))
    base = chosen.loc[chosen["algorithm"] == baselines, [*by, *PAIR, "algorithm", "accuracy"]]
    others = chosen[chosen["algorithm"] != baselines]
    pairs = others.merge(base.rename(columns={"algorithm": "baseline"}), on=[*by, *PAIR], suffixes=("", "_base"))
    pairs["accuracy"] -= pairs["accuracy_base"]  # from here on a difference, under the name that means are taken of
    targets = expected.groupby(ROW)["target"].agg(set).to_dict()
    rows = []
    for key, row in pairs.groupby([*by, *ROW], sort=False):
        cells = {target: 100 * cell["accuracy"].to_numpy() for target, cell in row.groupby("target", sort=False)}
        label = [*key, row["baseline"].iloc[0]]
        rows += [_difference(label, target, values, values.mean()) for target, values in cells.items()]
        if targets[key[-2:]] <= set(cells):
            means = 100 * _repetitions(row, expected)["accuracy"].to_numpy()
            rows.append(_difference(label, AVERAGE, means, np.mean([values.mean() for values in cells.values()])))
    return pd.DataFrame(rows, columns=[*by, *DIFFERENCES])


def find_baselines(methods: pd.DataFrame, baseline: str | None) -> dict[str, str]:
    """{dataset: the method called `baseline` there}: by its whole label, or else by its algorithm's name alone.

    methods: columns ROW. baseline None: the first method of every data set. UserError where no method has the name, and
    where several methods of a data set have it.
    """
    by_dataset = methods.groupby("dataset", sort=False)["algorithm"].unique().to_dict()
    if baseline is None:
        return {dataset: names[0] for dataset, names in by_dataset.items()}
    named = {dataset: _called(baseline, names) for dataset, names in by_dataset.items()}
    for dataset, candidates in named.items():
        if len(candidates) > 1:
            raise UserError(
                "\n  ".join([f"{baseline!r} is the name of {len(candidates)} methods of {dataset}:", *candidates])
                + f"\nName one of them: --baseline {shlex.quote(candidates[0])}\n"
                "or leave out the runs of the others by what differs: --exclude KEY=VALUE, or --where KEY=VALUE."
            )
    if not any(named.values()):
        names = list(dict.fromkeys(methods["algorithm"]))
        raise UserError("\n  ".join([f"no method is called {baseline!r}. The methods:", *names]))
    return {dataset: candidates[0] for dataset, candidates in named.items() if candidates}


def _called(name: str, labels: Iterable[str]) -> list[str]:
    """The label that is `name`, or else those that begin with it: `erm (optimizer.lr=0.1)` of `erm`."""
    return [label for label in labels if label == name] or [label for label in labels if label.startswith(f"{name} (")]


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval of the mean of `values` [n]; (nan, nan) for fewer than two.

    mean +- t(n - 1) s / sqrt(n), s the sample standard deviation.
    """
    n = len(values)
    if n < 2:
        return float("nan"), float("nan")
    half = import_scipy_stats().t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / n**0.5
    return float(values.mean() - half), float(values.mean() + half)


def sign_flip_p(values: np.ndarray) -> float:
    """Two-sided p of the permutation test that flips the signs of the differences `values` [n]; nan for fewer than two.

    If neither method is better, each difference is as likely to have the other sign. It cannot be below 2^(1 - n).
    """
    if len(values) < 2:
        return float("nan")
    test = import_scipy_stats().permutation_test
    options = {"permutation_type": "samples", "vectorized": True, "n_resamples": FLIPS, "rng": 0}
    return float(test((np.round(values, 9),), np.mean, **options).pvalue)


def import_scipy_stats() -> ModuleType:
    """scipy.stats. UserError where scipy is not installed: only comparisons need it."""
    try:
        from scipy import stats
    except ImportError:
        raise UserError(
            "a comparison with a baseline needs scipy: pip install 'gsdg[statistics]' "
            "(in a checkout: pip install -e '.[statistics]')"
        ) from None
    return stats


def average_ranks(cells: pd.DataFrame) -> pd.DataFrame:
    """A row (RANKS) a method, the best first: its mean rank over data sets and targets (1 is best, equals share).

    Means that are printed alike are equal. Only over the cells that every method of `cells` (of one selection) has;
    empty without such a cell.
    """
    single = cells[(cells["target"] != AVERAGE) & cells["mean"].notna()]
    table = single.pivot(index=["dataset", "target"], columns="algorithm", values="mean").dropna()
    ranks = table.map(lambda mean: float(printed(mean))).rank(axis="columns", ascending=False).mean().dropna()
    found = pd.DataFrame({"algorithm": ranks.index, "rank": ranks.to_numpy(), "cells": len(table)})
    return found.sort_values("rank", kind="stable").reset_index(drop=True)[RANKS]


def draw_counts(draws: pd.DataFrame) -> pd.DataFrame:
    """Of every repetition how many hyper-parameter draws could be chosen from: columns REPETITION, draws."""
    return draws.groupby(REPETITION).size().rename("draws").reset_index()


def missing_cells(draws: pd.DataFrame, status: pd.DataFrame, expected: pd.DataFrame, selection: str) -> pd.DataFrame:
    """Why runs are not in the table, a row (MISSING) each: not done, nothing to choose from, or no such run.

    draws: `selection.every_draw`. Every cell of `expected` should have every trial seed seen in its dataset, and every
    draw seen of its method.
    """
    single = status[status["n_targets"] == 1]
    left_out = single[~single["run_id"].isin(draws["run_id"])]
    pairs = _pairs_by_draw(status) if selection == "leave_one_domain_out" else None
    reasons = [_reason(run, pairs) for run in left_out.to_dict("records")]
    seeds = single[["dataset", "trial_seed"]].drop_duplicates().sort_values("trial_seed")
    numbers = single[[*ROW, "hparams_seed"]].drop_duplicates().sort_values("hparams_seed")
    wanted = expected.merge(seeds, on="dataset").merge(numbers, on=ROW)
    one = [*CELL, "trial_seed", "hparams_seed"]
    found = wanted.merge(single[one].drop_duplicates(), how="left", indicator=True)
    absent = found[found["_merge"] == "left_only"].assign(run_id="", reason=NO_RUN)
    return pd.concat([left_out.assign(reason=reasons)[MISSING], absent[MISSING]], ignore_index=True)


def _mean_and_error(values: pd.DataFrame, by: list[str], error: str) -> pd.DataFrame:
    """Columns `by`, mean, se, n of the accuracies, in percent: standard deviation / sqrt(n)."""
    groups = values.groupby(by)["accuracy"]
    found = pd.DataFrame({"mean": 100 * groups.mean(), "se": 100 * groups.std(ddof=ERRORS[error]), "n": groups.size()})
    found["se"] = (found["se"] / found["n"] ** 0.5).where(found["n"] > 1)
    return found.reset_index()


def _difference(label: list, target: str, values: np.ndarray, mean: float) -> list:
    """A row of DIFFERENCES: `mean`, with the interval as wide as that of `values` [n], percentage points."""
    shift = mean - values.mean() if len(values) else 0.0
    low, high = t_interval(values)
    better = int((values > NOISE).sum())
    *cell, baseline = label
    return [*cell, target, baseline, mean, low + shift, high + shift, sign_flip_p(values), better, len(values)]


def _repetitions(chosen: pd.DataFrame, expected: pd.DataFrame) -> pd.DataFrame:
    """The mean over its targets of every (trial seed, seed) that has them all."""
    means = chosen.groupby([*ROW, "trial_seed", "seed"]).agg(accuracy=("accuracy", "mean"), cells=("target", "nunique"))
    wanted = expected.groupby(ROW).agg(wanted=("target", "nunique")).reset_index()
    joined = means.reset_index().merge(wanted, on=ROW)
    return joined[joined["cells"] == joined["wanted"]]


def _pairs_by_draw(status: pd.DataFrame) -> dict[tuple, dict[frozenset, dict]]:
    """{draw without its target: {the two targets: the run}}."""
    found: dict[tuple, dict[frozenset, dict]] = {}
    for run in status[status["n_targets"] == 2].to_dict("records"):
        found.setdefault(_draw_of(run), {})[frozenset(run["targets"])] = run
    return found


def _draw_of(run: dict) -> tuple:
    return tuple(run[column] for column in DRAW if column != "target")


def _reason(run: dict, pairs: dict[tuple, dict[frozenset, dict]] | None) -> str:
    if run["state"] != "done":
        return _standing(run)
    if pairs is None:
        return "done, but the accuracies that this selection needs are not in its records"
    there = pairs.get(_draw_of(run), {})
    others = [domain for domain in run["domains"] if domain != run["target"]]
    found = {domain: there.get(frozenset([run["target"], domain])) for domain in others}
    gaps = [f"{domain} ({NO_RUN})" for domain, pair in found.items() if pair is None]
    gaps += [f"{d} ({p['run_id']}: {_standing(p)})" for d, p in found.items() if p and p["state"] != "done"]
    if not gaps:
        return "done, and so are its pairs, but no step is in the records of all of them"
    return f"needs the runs that leave out, beside it, {', '.join(gaps)}"


def _standing(run: dict) -> str:
    at = f"step {run['step']}" + (f" of {run['steps']}" if run["state"] != "failed" else "")
    return f"{run['state']} at {at}" + (f": {run['reason']}" if run["reason"] else "")
