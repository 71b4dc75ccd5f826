"""Interquartile means with stratified-bootstrap intervals, and the values that the library rliable reads.

A task is a cell (data set, target); its runs are the cell's repetitions (trial seed, seed).

Source: Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, NeurIPS 2021,
arXiv:2108.13264, and their library rliable 1.2.0, which computes the same numbers.
Deviations: no optimality gap, because for accuracies, which are at most 1, it is 1 - mean. The seed is fixed: rliable
draws from numpy's global generator, also if it is given a random_state.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from gsdg.analysis.formats import Entry, Sheet, few
from gsdg.analysis.selection import groups
from gsdg.analysis.statistics import AVERAGE, CELL, CONFIDENCE, find_baselines, import_scipy_stats
from gsdg.analysis.tables import MOST_NAMED, Summary
from gsdg.metrics import Metric
from gsdg.utils.errors import UserError, listing, plural
from gsdg.utils.json_files import replace_file

RESAMPLES = 10_000
SEED = 0
FEW_RUNS = 10  # with fewer runs per task, a bootstrap's intervals are visibly too narrow
IMPROVEMENT = "that a run is better than one of the same task, equal ones count half; the mean over tasks"


@dataclass(frozen=True)
class Scores:
    """The values of one selection, as recorded: a share is a fraction.

    Args:
        tasks: the cells (data set, target) that every method has.
        of_method: {method: [runs, tasks]}. The runs of a column are in the order of their seeds; a row is no unit.
        left_out: `erm (2 of 12)`: methods with unequal numbers of runs per task, of which each task keeps the first.
    """

    tasks: list[tuple[str, str]]
    of_method: dict[str, np.ndarray]
    left_out: list[str]


def scores(chosen: pd.DataFrame, cells: pd.DataFrame) -> Scores:
    """The values of the runs of one selection, methods and tasks in the order of the tables.

    Args:
        chosen: the selected runs, columns `selection.CHOSEN`.
        cells: columns `statistics.CELL`.
    """
    ordered = chosen.sort_values(["trial_seed", "seed"], kind="stable")
    values = {key: list(rows["value"]) for key, rows in groups(ordered, "algorithm", "dataset", "target")}
    seen = {name for name, *_ in values}
    methods = [name for name in dict.fromkeys(cells["algorithm"]) if name in seen]
    of_table = dict.fromkeys(zip(cells["dataset"], cells["target"], strict=True))
    tasks = [task for task in of_table if all((name, *task) in values for name in methods)]
    of_method, left_out = {}, []
    for name in methods if tasks else []:
        columns = [values[(name, *task)] for task in tasks]
        runs, total = min(map(len, columns)), sum(map(len, columns))
        of_method[name] = np.array([column[:runs] for column in columns]).T
        left_out += [f"{name} ({total - runs * len(tasks)} of {total})"] if runs * len(tasks) < total else []
    return Scores(tasks, of_method, left_out)


# ---- aggregates of values [..., runs, tasks] -> [...] ---------------------------------------------------------------


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """The mean of the middle half of all values, of all runs and tasks together."""
    flat = values.reshape(*values.shape[:-2], -1)
    return import_scipy_stats("--intervals").trim_mean(flat, 0.25, axis=-1)


def mean(values: np.ndarray) -> np.ndarray:
    """The mean over tasks."""
    return values.mean(axis=(-2, -1))


def median(values: np.ndarray) -> np.ndarray:
    """The median over tasks of each task's mean."""
    return np.median(values.mean(axis=-2), axis=-1)


AGGREGATES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "IQM": interquartile_mean,
    "mean": mean,
    "median": median,
}


def probability_of_improvement(
    values: np.ndarray, baseline: np.ndarray, *, lower_is_better: bool = False
) -> np.ndarray:
    """How probable it is that a run is better than a run of the baseline of the same task, the mean over tasks.

    Equal values count half. Both have values [..., runs, tasks]; the numbers of runs may differ.
    """
    sign = -1 if lower_is_better else 1
    of_tasks = []
    for task in range(values.shape[-1]):  # one by one: all at once would take the memory of runs^2 x tasks values
        gains = sign * (values[..., :, None, task] - baseline[..., None, :, task])
        of_tasks.append(((gains > 0) + 0.5 * (gains == 0)).mean(axis=(-2, -1)))
    return np.mean(of_tasks, axis=0)


def resample(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """[RESAMPLES, runs, tasks]: of each task as many runs as it has, drawn from its values [runs, tasks] independently.

    The tasks stay the same: the spread of the resamples is what other seeds would change.
    """
    runs, tasks = values.shape
    drawn = generator.integers(runs, size=(RESAMPLES, runs, tasks))
    return values[drawn, np.arange(tasks)]


def percentile_interval(resampled: np.ndarray) -> tuple[float, float]:
    """The 95 % interval between the percentiles 2.5 and 97.5 of an aggregate of the resamples [RESAMPLES]."""
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


# ---- the tables and the file ----------------------------------------------------------------------------------------


def intervals(results: Summary, baseline: str | None = None) -> list[Sheet]:
    """The aggregates of each method with their 95 % intervals, one table per selection.

    Args:
        baseline: also show the probability of improvement over this method, see `statistics.find_baselines`.

    Raises:
        UserError: no cell has a result of every method; or scipy is not installed.
    """
    return [_sheet(of, selection, results, baseline) for selection, of in _all_scores(results, "--intervals")]


def write_scores(path: str | Path, results: Summary) -> str:
    """Write {method: array [runs, tasks]} to a .npz file, and return a text that says what is in it.

    rliable reads it: `rliable.library.get_interval_estimates(dict(numpy.load(path)), ...)`.

    Raises:
        UserError: several selections; no cell has a result of every method; or the file cannot be written.
    """
    option, path, file = f"--rliable {path}", Path(path), io.BytesIO()
    if results.cells["selection"].nunique() > 1:
        raise UserError(f"{option}: the file has the values of one selection. Give one --selection.")
    ((_, found),) = _all_scores(results, option)
    np.savez(file, **found.of_method)  # ty: ignore[invalid-argument-type]
    try:
        replace_file(path, file.getvalue())
    except OSError as error:
        raise UserError(
            f"{option}: cannot be written: {error.strerror}. Give a file in a folder that exists."
        ) from None
    metric = results.metric
    unit = "fractions" if metric.percent else "as recorded"
    shapes = [f"{name} {list(values.shape)}" for name, values in found.of_method.items()]
    lines = [f"written: {path}: {metric.name}, {unit}, arrays [runs, tasks]: {listing(shapes)}"]
    lines.append(f"its tasks: {listing('/'.join(task) for task in found.tasks)}")
    return "\n".join([*lines, *_left_out_line(found)])


def _all_scores(results: Summary, option: str) -> list[tuple[str, Scores]]:
    """[(selection, its scores)]. UserError if no task has a value of every method. option: of the command line."""
    cells = results.cells[results.cells["target"] != AVERAGE]
    found = []
    for (selection,), chosen in groups(results.chosen, "selection"):
        found.append((selection, scores(chosen, cells)))
        if not found[-1][1].tasks:
            raise UserError(_no_common_task(option, selection, chosen))
    if not found:
        raise UserError(f"{option}: no run has a result yet. Wait until runs are done, or give --unfinished.")
    return found


def _no_common_task(option: str, selection: str, chosen: pd.DataFrame) -> str:
    counts = chosen.drop_duplicates(CELL)["algorithm"].value_counts(sort=False)
    return (
        f"{option}, {selection}: needs a cell (data set, target) in which every method has a result, and found none. "
        f"Cells with a result: {listing(f'{name}: {n}' for name, n in counts.items())}\n"
        f"Add the missing runs, which are listed without {option}, or leave out methods that lack cells: "
        "--exclude algorithm=NAME"
    )


def _sheet(of: Scores, selection: str, results: Summary, baseline: str | None) -> Sheet:
    metric, base = results.metric, _baseline_of(of, results, baseline)
    rows = []
    for name, values in of.of_method.items():
        entries = _formatted(values, metric)
        if base:
            entries.append("-" if name == base else _improvement(values, of.of_method[base], metric))
        rows.append([*map(Entry, [name, *entries, str(len(values))])])
    improvement = [f"P(better than {base})"] if base else []
    below = [
        *_explained(of, metric),
        *(f"{name}: {IMPROVEMENT}" for name in improvement),
        *_warnings(of),
        *_left_out_line(of),
    ]
    return Sheet(f"intervals, {selection}", ["algorithm", *AGGREGATES, *improvement, "runs"], rows, below)


def _baseline_of(of: Scores, results: Summary, baseline: str | None) -> str:
    """The label of the baseline; "" if none is given or it has no values."""
    labels = find_baselines(results.cells, baseline).values() if baseline is not None else ()
    return next((label for label in labels if label in of.of_method), "")


def _formatted(values: np.ndarray, metric: Metric) -> list[str]:
    """`85.0 [83.1, 86.9]` of each aggregate of values [runs, tasks]; without interval for a single run per task."""
    resampled = resample(values, np.random.default_rng(SEED))
    texts = []
    for aggregate in AGGREGATES.values():
        low, high = percentile_interval(aggregate(resampled))
        point, low, high = (f"{metric.scale * number:.{metric.decimals}f}" for number in (aggregate(values), low, high))
        texts.append(f"{point} [{low}, {high}]" if len(values) > 1 else point)
    return texts


def _improvement(values: np.ndarray, baseline: np.ndarray, metric: Metric) -> str:
    """`0.75 [0.50, 1.00]`, the probability of improvement; without interval for a single run per task."""
    generator, lower = np.random.default_rng(SEED), metric.lower_is_better
    resampled = resample(values, generator), resample(baseline, generator)  # one after the other: independent draws
    low, high = percentile_interval(probability_of_improvement(*resampled, lower_is_better=lower))
    point = f"{probability_of_improvement(values, baseline, lower_is_better=lower):.2f}"
    return f"{point} [{low:.2f}, {high:.2f}]" if min(len(values), len(baseline)) > 1 else point


def _explained(of: Scores, metric: Metric) -> list[str]:
    """The lines below a table that explain its numbers."""
    return [
        f"{metric.label}, over the {plural(len(of.tasks), 'task')} (data set, target) that every method has",
        "IQM: interquartile mean, of the middle half of all runs' values; median: of the tasks' means; runs: per task",
        f"[95 % interval]: stratified bootstrap, the runs of each task drawn anew {RESAMPLES} times, seed {SEED} "
        "(Agarwal et al. 2021); it says what other seeds would change, not other data sets",
    ]


def _warnings(of: Scores) -> list[str]:
    """A line if there are few runs. A bootstrap's spread is that of the population form, sqrt((n - 1) / n) of s."""
    runs = min(map(len, of.of_method.values()))
    if runs == 1:
        return ["warning: a single run per task has no interval; train several seeds: split.trial_seed=0,1,2"]
    factor = ((runs - 1) / runs) ** 0.5
    narrow = f"warning: only {runs} runs per task: intervals are too narrow, the mean's by a factor of {factor:.2f}"
    return [narrow] if runs < FEW_RUNS else []


def _left_out_line(of: Scores) -> list[str]:
    text = f"note: as many runs of each task as of the one with the fewest; left out: {few(of.left_out, MOST_NAMED)}"
    return [text] if of.left_out else []
