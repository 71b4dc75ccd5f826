"""Tests of whether methods differ over several data sets: Friedman, Nemenyi, and the Bayesian signed-rank test.

A block is a cell (data set, target), and its value the mean over the cell's runs. Demšar's blocks are data sets, but
domain generalization has about five of those, too few for any of the tests. Seeds cannot be blocks: they vary the
training, not the problem. The price is that the targets of one data set are not independent blocks, because the runs of
any two of them share source domains. So the tests find differences more easily than they should, and the tables say so.

Sources: Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7 (2006); Benavoli, Corani, Demšar
and Zaffalon, Time for a Change, JMLR 18 (2017).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType

import numpy as np
import pandas as pd

from gsdg.analysis.formats import Entry, Sheet
from gsdg.analysis.selection import groups
from gsdg.analysis.statistics import (
    find_baselines,
    import_scipy_stats,
    means_by_block,
    ranks_by_block,
)
from gsdg.analysis.tables import Summary
from gsdg.metrics import ACCURACY, Metric
from gsdg.utils.errors import UserError, listing, not_installed, plural

ALPHA = 0.05  # significance level of the critical difference
ROPE = 1.0  # percentage points: Benavoli et al. call accuracies that differ by less than 0.01 practically equivalent
FEW_BLOCKS = 10  # Demšar: the distribution of Friedman's statistic is close to chi-squared for more blocks
SAMPLES = 50_000  # of the posterior, baycomp's default: the printed probabilities have a standard error below 0.003
SEED = 0
DEPENDENT = (
    "blocks of one data set are not independent, because they share source domains: read the tests as optimistic"
)


def significance(results: Summary, baseline: str | None = None, rope: float | None = None) -> list[Sheet]:
    """The tests of each selection: of all methods if there are three or more, and against the baseline.

    Args:
        baseline: see `statistics.find_baselines`. None: with two methods the first, with more no baseline.
        rope: half-width of the region of practical equivalence, in percentage points or in the metric's unit. None:
            ROPE, for a share.

    Raises:
        UserError: fewer than two methods, or than two blocks with a result of all of them; or a library is missing.
    """
    tables, metric = [], results.metric
    for (selection,), cells in groups(results.cells, "selection"):
        means = means_by_block(cells)
        methods = means.shape[1]
        if methods != 2:
            _check_enough(means, len(means.dropna()), selection)
            tables.append(_friedman_sheet(ranks_by_block(cells, metric), selection, len(means)))
        if methods == 2 or baseline is not None:
            first = dict.fromkeys(means.index.unique("dataset"), means.columns[0])
            baselines = first if baseline is None else find_baselines(cells, baseline)
            tables.append(_bayesian_sheet(means, baselines, selection, metric, _valid_rope(rope, metric)))
        elif rope is not None:
            raise UserError(
                f"--rope: the Bayesian test of {methods} methods needs one to compare with: --baseline METHOD"
            )
    if not tables:
        raise UserError("--significance: no run with one target has been found.")
    return tables


def _check_enough(means: pd.DataFrame, blocks: int, selection: str) -> None:
    """UserError unless there are two methods and two blocks. means: see `statistics.means_by_block`."""
    if means.shape[1] >= 2 and blocks >= 2:
        return
    counts = listing(f"{name}: {n}" for name, n in means.notna().sum().items())
    raise UserError(
        f"--significance, {selection}: needs at least two methods, and two cells (data set, target) in which both or "
        f"all of them have a result.\nFound: {plural(means.shape[1], 'method')} with results, and "
        f"{plural(blocks, 'such cell')}. Cells with a result: {counts}\n"
        "Add the missing runs, which are listed without --significance, or leave out methods that lack cells: "
        "--exclude algorithm=NAME"
    )


def _valid_rope(rope: float | None, metric: Metric) -> float:
    """The half-width of the region; by default ROPE. UserError unless > 0, and where there is no default."""
    if rope is None and not metric.percent:
        raise UserError(
            f"--significance: {metric.name} is no share and has no default region. Give its half-width: --rope"
        )
    if rope is not None and not 0 < rope < float("inf"):
        raise UserError(f"--rope: found {rope}, expected a number above 0: the half-width of the region.")
    return ROPE if rope is None else rope


def _block_lines(blocks: int, which: str) -> list[str]:
    """What the blocks are, and a warning if there are few."""
    lines = [f"blocks: {which}", DEPENDENT]
    warning = (
        f"warning: {plural(blocks, 'block')} only; with {FEW_BLOCKS} or fewer, p values are rough and priors matter"
    )
    return [*lines, warning] if blocks <= FEW_BLOCKS else lines


def format_p(p: float) -> str:
    """`0.017`, `<0.001`"""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


# ---- all methods: Friedman and Nemenyi ------------------------------------------------------------------------------


def friedman(ranks: np.ndarray) -> tuple[float, float]:
    """(chi-squared, p) of the Friedman test of ranks [blocks, methods], from scipy, which corrects for ties.

    Demšar's formula has no such correction: for his table 6 it gives 9.28, and scipy 10.23. (0, 1) if all methods share
    their rank in every block, where the corrected statistic is 0 / 0.
    """
    if (ranks == ranks[:, :1]).all():
        return 0.0, 1.0
    statistic, p = import_scipy_stats("--significance").friedmanchisquare(*ranks.T)
    return float(statistic), float(p)


def critical_difference(methods: int, blocks: int, alpha: float = ALPHA) -> float:
    """The Nemenyi test's: average ranks that differ by at least this much differ at the level alpha.

    q / sqrt(2) * sqrt(k (k + 1) / 6N), where q is the quantile of the studentized range (Demšar, section 3.2.2).
    """
    quantile = import_scipy_stats("--significance").studentized_range.isf(alpha, methods, np.inf)
    return float(quantile / np.sqrt(2) * _error_of_ranks(methods, blocks))


def nemenyi_p(average_ranks: np.ndarray, blocks: int) -> np.ndarray:
    """[methods, methods]: the p value of the Nemenyi test for each pair of average ranks [methods]."""
    methods = len(average_ranks)
    differences = np.abs(average_ranks[:, None] - average_ranks)
    ranges = np.sqrt(2) * differences / _error_of_ranks(methods, blocks)
    return import_scipy_stats("--significance").studentized_range.sf(ranges, methods, np.inf)


def _error_of_ranks(methods: int, blocks: int) -> float:
    """The standard deviation of the difference of two average ranks if no method is better."""
    return float(np.sqrt(methods * (methods + 1) / (6 * blocks)))


def _friedman_sheet(ranks: pd.DataFrame, selection: str, cells: int) -> Sheet:
    """Methods by average rank, with the p value of each pair below the diagonal.

    Args:
        ranks: see `ranks_by_block`.
        cells: how many cells any method has.
    """
    average, (n, k) = ranks.mean().sort_values(kind="stable"), ranks.shape
    p = nemenyi_p(average.to_numpy(), n)
    rows = [
        [
            Entry(f"{i + 1}. {name}"),
            Entry(f"{rank:.2f}"),
            *(Entry(format_p(p[i, j]) if j < i else "") for j in range(k - 1)),
        ]
        for i, (name, rank) in enumerate(average.items())
    ]
    datasets = plural(ranks.index.get_level_values("dataset").nunique(), "data set")
    number = f"{n}" if n == cells else f"{n} of {cells}"
    which = f"the {number} cells (data set, target) that every method has, in {datasets}"
    below = [*_friedman_lines(ranks.to_numpy()), *_block_lines(n, which)]
    header = ["algorithm", "rank", *(f"p against {j + 1}" for j in range(k - 1))]
    return Sheet(f"significance, {selection}: all methods", header, rows, below)


def _friedman_lines(ranks: np.ndarray) -> list[str]:
    (n, k), (chi2, p) = ranks.shape, friedman(ranks)
    rejected = "average ranks differ" if p < ALPHA else f"p is not below {ALPHA}, so no pair counts as different"
    return [
        "rank: 1 is best, means that are printed the same share their rank",
        f"Friedman test: chi-squared {chi2:.2f}, {k - 1} degrees of freedom, p {format_p(p)}: {rejected}",
        f"Nemenyi test of each pair: critical difference of average ranks {critical_difference(k, n):.2f} (p {ALPHA})",
    ]


# ---- against a baseline: the Bayesian signed-rank test --------------------------------------------------------------


def bayesian_signed_rank(gains: np.ndarray, rope: float) -> tuple[float, float, float]:
    """(better, equivalent, worse): how probable it is that each of these is the most probable outcome.

    By Benavoli et al., with baycomp's prior: the weight of half a block at a difference of 0, in the region.

    Args:
        gains: [blocks], how much better the method is than the baseline.
        rope: gains within [-rope, rope] are practically equivalent, > 0, in the unit of the gains.
    """
    test, zeros = _import_baycomp().SignedRankTest, np.zeros(len(gains))
    posterior = test(zeros, np.round(gains, 9), rope, nsamples=SAMPLES, random_state=SEED)
    worse, equivalent, better = posterior.probs()
    return float(better), float(equivalent), float(worse)


def gains_over(means: pd.DataFrame, baselines: Mapping[str, str], metric: Metric = ACCURACY) -> dict[str, np.ndarray]:
    """{method: [blocks], how much better it is than the baseline in the cells that both have}.

    Args:
        means: see `statistics.means_by_block`.
        baselines: {dataset: label of its baseline}. A method has no gain over itself.
    """
    labels = means.index.get_level_values("dataset").map(dict(baselines))
    base = np.array([means[label].iloc[i] if label in means else np.nan for i, label in enumerate(labels)])
    sign = -1 if metric.lower_is_better else 1
    gains = {name: sign * (means[name].to_numpy() - base)[labels != name] for name in means}
    return {name: values[~np.isnan(values)] for name, values in gains.items() if (labels != name).any()}


def _bayesian_sheet(
    means: pd.DataFrame, baselines: Mapping[str, str], selection: str, metric: Metric, rope: float
) -> Sheet:
    """The probabilities of each method against the baseline; "-" for a method with fewer than two common cells."""
    gains = gains_over(means, baselines, metric)
    most, name = max(map(len, gains.values()), default=0), listing(dict.fromkeys(baselines.values()))
    _check_enough(means, most, selection)
    rows = []
    for method, values in gains.items():
        probabilities = [f"{p:.3f}" for p in bayesian_signed_rank(values, rope)] if len(values) > 1 else ["-"] * 3
        rows.append([Entry(method), *map(Entry, probabilities), Entry(str(len(values)))])
    unit = f"{rope:g} percentage point{'s' * (rope != 1)}" if metric.percent else f"{rope:g} of {metric.name}"
    below = [
        f"probability that the method is better than {name}, practically equivalent (within {unit}), or worse",
        f"Bayesian signed-rank test (Benavoli et al. 2017; baycomp, {SAMPLES} samples, seed {SEED})",
        *_block_lines(min(map(len, gains.values())), "the cells (data set, target) that both methods have"),
    ]
    title = f"significance, {selection}: against {name}"
    return Sheet(title, ["algorithm", "better", "equivalent", "worse", "blocks"], rows, below)


def _import_baycomp() -> ModuleType:
    """baycomp, by the authors of the test. UserError if it is not installed."""
    try:
        return import_module("baycomp")
    except ImportError:
        raise not_installed("the Bayesian signed-rank test of --significance", "baycomp", "statistics") from None
