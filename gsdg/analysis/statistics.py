"""Selected runs -> the numbers of the tables, why some are missing, and comparisons of methods. Pure functions.

All numbers are in percent, those of a metric that is no share as they are. A cell is one data set, method and target;
a row is one data set and method.

Source: DomainBed's tables: mean +- population standard deviation / sqrt(n); a row's average is the mean of its cells.
Deviation: DomainBed gives no error of that average. Here it is the standard error over repetitions (trial seed, seed)
of the repetition's mean over targets, from the repetitions that have all targets of the row.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable
from types import ModuleType

import numpy as np
import pandas as pd

from gsdg.analysis.read.labels import natural
from gsdg.analysis.selection import DRAW, REPETITION
from gsdg.metrics import ACCURACY, Metric
from gsdg.utils.errors import UserError, not_installed

ROW = ["dataset", "algorithm"]
CELL = [*ROW, "target"]
PAIR = ["dataset", "target", "trial_seed", "seed"]  # equal in the two runs of a pair, of which one is each method's
CELLS = ["dataset", "algorithm", "selection", "target", "mean", "se", "n"]
MISSING = [*CELL, "trial_seed", "hparams_seed", "run_id", "kind", "reason"]
DIFFERENCES = [*CELL, "baseline", "difference", "low", "high", "p", "better", "n"]
RANKS = ["algorithm", "rank", "cells"]
AVERAGE = "average"
NO_RUN = "no such run"
NOT_RECORDED = "done, but without {0} in its records: trainer.metrics=[accuracy,{0}] force=true runs it again with it"
ACCURACY_ONLY = "done, but without {0} in its records: DomainBed and the SWAD fork record the accuracy only"
NO_VALUES = "done, but the {} that this selection needs {} not in its records"
NO_SHARED_STEP = "done, as are the runs that also leave out another domain, but they have no recorded step in common"
NO_PAIRS = "done, but not all runs that also leave out another domain are"
ERRORS = {"population": 0, "sample": 1}  # form of the standard deviation -> ddof (delta degrees of freedom)
CONFIDENCE = 0.95
FLIPS = 2**14  # sign flips in a permutation test of n differences: all up to n = 14, a random sample for larger n
NOISE = 1e-9  # percentage points; means of equal accuracies may differ by this much


def expected_cells(status: pd.DataFrame) -> pd.DataFrame:
    """The cells that the runs with one target should fill: columns CELL, in the order of the table.

    The targets are the dataset's domains according to the runs' configs; if no config names them, the targets seen.
    """
    single = status[status["n_targets"] == 1]
    cells = []
    for dataset, runs in single.groupby("dataset"):
        targets_seen = sorted(set(runs["target"]), key=natural)
        for algorithm in sorted(set(runs["algorithm"]), key=natural):
            of_configs = runs.loc[runs["algorithm"] == algorithm, "domains"]
            domains = list(dict.fromkeys(domain for domains in of_configs for domain in domains))
            cells += [(dataset, algorithm, target) for target in domains or targets_seen]
    return pd.DataFrame(cells, columns=CELL)


def table_cells(
    chosen: pd.DataFrame,
    expected: pd.DataFrame,
    selection: str,
    error: str = "population",
    metric: Metric = ACCURACY,
) -> pd.DataFrame:
    """The numbers of a table: one row (columns CELLS) for each cell and for each row's average (target "average").

    Args:
        chosen: the selected runs, columns `selection.CHOSEN`.
        expected: the cells of the table, columns CELL.
        selection: the value of the column `selection`.
        error: form of the standard deviation that is divided by sqrt(n): population (DomainBed's) or sample.
        metric: what `chosen` has values of.

    mean and se of a share are in percent. n is the number of runs, or for an average the number of complete
    repetitions. A cell without a run has mean NaN, and so has the average of its row. se is NaN if n < 2.
    """
    cells = expected.merge(_mean_and_error(chosen, CELL, error, metric), on=CELL, how="left")
    rows = cells.groupby(ROW, sort=False)["mean"].agg(lambda means: means.mean(skipna=False)).reset_index()
    errors = _mean_and_error(_complete_repetitions(chosen, expected), ROW, error, metric).drop(columns="mean")
    averages = rows.merge(errors, on=ROW, how="left").assign(target=AVERAGE)
    table = pd.concat([cells, averages], ignore_index=True).assign(selection=selection)
    return table.assign(n=table["n"].fillna(0).astype(int))[CELLS]


def over_datasets(cells: pd.DataFrame) -> pd.DataFrame:
    """A table over all data sets: the averages of `cells` with data sets in place of targets, and dataset "all".

    The average of a row is the mean over data sets; it is NaN if the row lacks a data set. It has no standard error,
    because the repetitions of different data sets are not paired.
    """
    averages = cells[cells["target"] == AVERAGE].assign(target=lambda rows: rows["dataset"], dataset="all")
    datasets, row = list(dict.fromkeys(averages["target"])), ["selection", "algorithm"]
    rows = averages.drop_duplicates(row)[row]
    every_cell = rows.merge(pd.DataFrame({"target": datasets}), how="cross")
    by_dataset = every_cell.merge(averages.drop(columns="dataset"), on=[*row, "target"], how="left")
    means = by_dataset.groupby(row, sort=False)["mean"].agg(lambda means: means.mean(skipna=False)).reset_index()
    smallest_n = by_dataset.groupby(row, sort=False)["n"].min().fillna(0).reset_index()
    overall = means.merge(smallest_n, on=row).assign(target=AVERAGE, se=float("nan"))
    table = pd.concat([by_dataset, overall], ignore_index=True).assign(dataset="all")
    return table.assign(n=table["n"].fillna(0).astype(int))[CELLS]


def format_mean(mean: float, metric: Metric = ACCURACY) -> str:
    """A mean as the tables show it. Best marks and ranks compare this text, so that equal-looking means are equal."""
    return f"{mean:.{metric.decimals}f}"


def paired_differences(
    chosen: pd.DataFrame, expected: pd.DataFrame, baseline: str | None = None, metric: Metric = ACCURACY
) -> pd.DataFrame:
    """Each method's value minus the baseline's, in percentage points: one row (DIFFERENCES) per cell and average.

    Args:
        chosen: the selected runs, columns `selection.CHOSEN`; with a column `selection`, selections are kept apart and
            the result begins with that column.
        expected: the cells of the tables, columns CELL.
        baseline: see `find_baselines`.
        metric: what `chosen` has values of. If it is no share, the differences are not scaled.

    For a cell, `difference` is the mean over the n pairs of runs with equal trial seed and seed, low and high are the
    pairs' `t_interval`, p is their `sign_flip_p`, and `better` counts the pairs above 0 (below 0 if lower is better).

    For an average, `difference` is the mean over the row's cells, as in the table; there is no average if a cell of
    `expected` has no pair. Its interval, p, better and n are computed over complete repetitions (trial seed, seed), of
    each the mean over its targets, because that one target is harder than another does not make the mean uncertain.

    A data set in which the baseline has no results has no rows.

    Raises:
        UserError: `baseline` names no method of `expected`, or several of one data set; or scipy is not installed.
    """
    import_scipy_stats()  # fail before the computation if scipy is not installed
    by = [column for column in chosen if column == "selection"]
    baselines = chosen["dataset"].map(find_baselines(expected, baseline))
    base = chosen.loc[chosen["algorithm"] == baselines, [*by, *PAIR, "algorithm", "value"]]
    others = chosen[chosen["algorithm"] != baselines]
    pairs = others.merge(base.rename(columns={"algorithm": "baseline"}), on=[*by, *PAIR], suffixes=("", "_base"))
    pairs["value"] -= pairs["value_base"]  # a difference from here on; `_complete_repetitions` needs this name
    targets = expected.groupby(ROW)["target"].agg(set).to_dict()
    rows = []
    for key, row in pairs.groupby([*by, *ROW], sort=False):
        cells = {target: metric.scale * cell["value"].to_numpy() for target, cell in row.groupby("target", sort=False)}
        label = [*key, row["baseline"].iloc[0]]
        rows += [_difference_row(label, target, values, values.mean(), metric) for target, values in cells.items()]
        if targets[key[-2:]] <= set(cells):
            repetitions = metric.scale * _complete_repetitions(row, expected)["value"].to_numpy()
            mean_of_cells = np.mean([values.mean() for values in cells.values()])
            rows.append(_difference_row(label, AVERAGE, repetitions, mean_of_cells, metric))
    return pd.DataFrame(rows, columns=[*by, *DIFFERENCES])


def find_baselines(methods: pd.DataFrame, baseline: str | None) -> dict[str, str]:
    """{dataset: label of its baseline}.

    Args:
        methods: columns ROW.
        baseline: a method's label, or the name of its algorithm if only one method of the data set has it. None: the
            first method of every data set.

    Raises:
        UserError: no method has the name, or several methods of one data set have it.
    """
    by_dataset = methods.groupby("dataset", sort=False)["algorithm"].unique().to_dict()
    if baseline is None:
        return {dataset: names[0] for dataset, names in by_dataset.items()}
    candidates_of = {dataset: _labels_matching(baseline, names) for dataset, names in by_dataset.items()}
    for dataset, candidates in candidates_of.items():
        if len(candidates) > 1:
            raise UserError(
                "\n  ".join([f"{baseline!r} is the name of {len(candidates)} methods of {dataset}:", *candidates])
                + f"\nName one of them: --baseline {shlex.quote(candidates[0])}\n"
                "or leave out the runs of the others by what differs: --exclude KEY=VALUE, or --where KEY=VALUE."
            )
    if not any(candidates_of.values()):
        labels = list(dict.fromkeys(methods["algorithm"]))
        similar = [label for label in labels if label.partition(" (")[0].lower() == baseline.lower()]
        hint = f" Did you mean --baseline {shlex.quote(similar[0])}?" if similar else ""
        raise UserError("\n  ".join([f"no method is called {baseline!r}.{hint} The methods:", *labels]))
    return {dataset: candidates[0] for dataset, candidates in candidates_of.items() if candidates}


def _labels_matching(name: str, labels: Iterable[str]) -> list[str]:
    """The label equal to `name`, or else the labels of the algorithm `name`: `erm (optimizer.lr=0.1)` for `erm`."""
    return [label for label in labels if label == name] or [label for label in labels if label.startswith(f"{name} (")]


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's 95 % confidence interval of the mean of `values` [n]; (nan, nan) if n < 2.

    mean +- t(n - 1) s / sqrt(n), where s is the sample standard deviation.
    """
    n = len(values)
    if n < 2:
        return float("nan"), float("nan")
    half_width = import_scipy_stats().t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / n**0.5
    return float(values.mean() - half_width), float(values.mean() + half_width)


def sign_flip_p(values: np.ndarray) -> float:
    """Two-sided p value of the permutation test that flips the signs of the differences `values` [n]; nan if n < 2.

    Null hypothesis: neither method is better, so that each difference is equally likely to have the other sign. p is
    never below 2^(1 - n).
    """
    if len(values) < 2:
        return float("nan")
    test = import_scipy_stats().permutation_test
    options = {"permutation_type": "samples", "vectorized": True, "n_resamples": FLIPS, "rng": 0}
    return float(test((np.round(values, 9),), np.mean, **options).pvalue)


def import_scipy_stats(what: str = "a comparison with a baseline") -> ModuleType:
    """scipy.stats, which only comparisons need. UserError if scipy is not installed. what: that needs it."""
    try:
        from scipy import stats
    except ImportError:
        raise not_installed(what, "scipy", "statistics") from None
    return stats


def average_ranks(cells: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """The mean rank of each method over the cells that every method has: columns RANKS, the best method first.

    Rank 1 is best. Means that are printed the same share the mean of their ranks. The frame is empty if no cell has a
    result of every method.

    Args:
        cells: the cells of one selection, columns CELLS.
    """
    ranks = ranks_by_block(cells, metric)
    means = ranks.mean().dropna()
    frame = pd.DataFrame({"algorithm": means.index, "rank": means.to_numpy(), "cells": len(ranks)})
    return frame.sort_values("rank", kind="stable").reset_index(drop=True)[RANKS]


def ranks_by_block(cells: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """[blocks, methods]: the rank of each method in the cells that every method has; see `average_ranks`.

    The index is (dataset, target), the columns are the methods that have a result.
    """
    printed = means_by_block(cells).dropna().map(lambda mean: float(format_mean(mean, metric)))
    return printed.rank(axis="columns", ascending=metric.lower_is_better)


def means_by_block(cells: pd.DataFrame) -> pd.DataFrame:
    """[cells, methods]: the mean of each method in each cell (dataset, target); NaN where the method has no result.

    Methods without any result are left out. The others are in the order of the tables.

    Args:
        cells: the cells of one selection, columns CELLS.
    """
    single = cells[(cells["target"] != AVERAGE) & cells["mean"].notna()]
    means = single.pivot(index=["dataset", "target"], columns="algorithm", values="mean")
    return means[list(dict.fromkeys(single["algorithm"]))]


def draw_counts(draws: pd.DataFrame) -> pd.DataFrame:
    """How many hyper-parameter draws each repetition could choose from: columns REPETITION, draws."""
    return pd.DataFrame({"draws": draws.groupby(REPETITION).size()}).reset_index()


def missing_cells(
    draws: pd.DataFrame,
    status: pd.DataFrame,
    expected: pd.DataFrame,
    selection: str,
    metric: Metric = ACCURACY,
    recorded: Collection[str] = (),
) -> pd.DataFrame:
    """The runs that are not in the table, and why: one row (columns MISSING) per run.

    A run is missing if it is not done, if the selection cannot choose a step of it, or if it does not exist although
    it should: each cell of `expected` should have each trial seed seen in its data set and each draw seen of its
    method.

    Args:
        draws: the frame that `selection.every_draw` returns.
        status: `Runs.status`.
        expected: the cells of the table, columns CELL.
        metric: what the table has values of.
        recorded: the ids of the runs with a value of the metric in their records. Not needed for the accuracy, which
            every run records.

    The column `reason` is text for one run; `kind` is the same for all runs with a similar reason, to count them: a
    state, NO_PAIRS, NO_RUN, ...
    """
    # Runs that exist, but not in the table.
    single = status[status["n_targets"] == 1]
    left_out = single[~single["run_id"].isin(draws["run_id"])]
    pairs = _pairs_by_draw(status) if selection == "leave_one_domain_out" else None
    reasons = [_missing_reason(run, pairs, metric, recorded) for run in left_out.to_dict("records")]
    kinds, texts = [kind for kind, _ in reasons], [text for _, text in reasons]
    existing = left_out.assign(kind=kinds, reason=texts)

    # Runs that do not exist: the expected (cell, trial seed, draw) minus the existing ones.
    seeds = single[["dataset", "trial_seed"]].drop_duplicates().sort_values("trial_seed")
    numbers = single[[*ROW, "hparams_seed"]].drop_duplicates().sort_values("hparams_seed")
    wanted = expected.merge(seeds, on="dataset").merge(numbers, on=ROW)
    key = [*CELL, "trial_seed", "hparams_seed"]
    wanted = wanted.merge(single[key].drop_duplicates(), how="left", indicator=True)
    absent = wanted[wanted["_merge"] == "left_only"].assign(run_id="", kind=NO_RUN, reason=NO_RUN)
    return pd.concat([existing[MISSING], absent[MISSING]], ignore_index=True)


def _mean_and_error(values: pd.DataFrame, by: list[str], error: str, metric: Metric) -> pd.DataFrame:
    """Mean, standard error (standard deviation / sqrt(n)) and number of the values: columns by, mean, se, n."""
    groups, scale = values.groupby(by)["value"], metric.scale
    deviations = groups.std(ddof=ERRORS[error])
    frame = pd.DataFrame({"mean": scale * groups.mean(), "se": scale * deviations, "n": groups.size()})
    frame["se"] = (frame["se"] / frame["n"] ** 0.5).where(frame["n"] > 1)
    return frame.reset_index()


def _difference_row(label: list, target: str, values: np.ndarray, mean: float, metric: Metric) -> list:
    """A row of DIFFERENCES: `mean`, with the width of the `t_interval` of `values` [n].

    Args:
        label: [(selection,) dataset, algorithm, baseline].
        mean: differs from the mean of `values` where an average has cells with unequal numbers of pairs.
    """
    shift = mean - values.mean() if len(values) else 0.0
    low, high = t_interval(values)
    gains = -values if metric.lower_is_better else values
    better = int((gains > NOISE).sum())
    *cell, baseline = label
    return [*cell, target, baseline, mean, low + shift, high + shift, sign_flip_p(values), better, len(values)]


def _complete_repetitions(chosen: pd.DataFrame, expected: pd.DataFrame) -> pd.DataFrame:
    """The mean value over targets of each repetition (trial seed, seed) that has all targets of its row."""
    means = chosen.groupby([*ROW, "trial_seed", "seed"]).agg(value=("value", "mean"), cells=("target", "nunique"))
    wanted = expected.groupby(ROW).agg(wanted=("target", "nunique")).reset_index()
    joined = means.reset_index().merge(wanted, on=ROW)
    return joined[joined["cells"] == joined["wanted"]]


def _pairs_by_draw(status: pd.DataFrame) -> dict[tuple, dict[frozenset, dict]]:
    """The runs with two targets: {`_draw_key`: {set of the two targets: run}}."""
    pairs: dict[tuple, dict[frozenset, dict]] = {}
    for run in status[status["n_targets"] == 2].to_dict("records"):
        pairs.setdefault(_draw_key(run), {})[frozenset(run["targets"])] = run
    return pairs


def _draw_key(run: dict) -> tuple:
    """What runs with different targets of one method, draw and repetition have in common."""
    return tuple(run[column] for column in DRAW if column != "target")


def _missing_reason(
    run: dict, pairs: dict[tuple, dict[frozenset, dict]] | None, metric: Metric, recorded: Collection[str]
) -> tuple[str, str]:
    """(kind, reason) why an existing run is not in the table: see `missing_cells`. `pairs`: None if not needed."""
    if run["state"] != "done":
        return run["state"], _describe_state(run)
    if metric is not ACCURACY and run["run_id"] not in recorded:
        return NOT_RECORDED.format(metric.name), _describe_unrecorded(run, metric)
    if pairs is None:
        no_values = NO_VALUES.format(*(("accuracies", "are") if metric is ACCURACY else (metric.name, "is")))
        return no_values, no_values
    same_draw = pairs.get(_draw_key(run), {})
    sources = [domain for domain in run["domains"] if domain != run["target"]]
    pair_of = {domain: same_draw.get(frozenset([run["target"], domain])) for domain in sources}
    gaps = [f"{domain} ({NO_RUN})" for domain, pair in pair_of.items() if pair is None]
    gaps += [f"{d} ({p['run_id']}: {_describe_state(p)})" for d, p in pair_of.items() if p and p["state"] != "done"]
    if not gaps:
        return NO_SHARED_STEP, NO_SHARED_STEP
    return NO_PAIRS, f"needs the runs that also leave out {', '.join(gaps)}"


def _describe_unrecorded(run: dict, metric: Metric) -> str:
    """Why a run that is done has no value of the metric, and what records one."""
    if run["source"] == "gsdg":
        return NOT_RECORDED.format(metric.name)
    return ACCURACY_ONLY.format(metric.name)


def _describe_state(run: dict) -> str:
    """`running at step 4 of 10`, `failed at step 4: loss is nan`."""
    at = f"step {run['step']}" + (f" of {run['steps']}" if run["state"] != "failed" else "")
    return f"{run['state']} at {at}" + (f": {run['reason']}" if run["reason"] else "")
