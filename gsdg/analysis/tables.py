"""Runs -> numbers -> the tables that `python -m analysis` and the end of a sweep print, as `formats.Sheet`s."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from gsdg.analysis.caveats import caveats
from gsdg.analysis.formats import Entry, Sheet, few, text
from gsdg.analysis.read.frames import Runs, read_runs
from gsdg.analysis.selection import METHODS, choose, every_draw, explanation, groups
from gsdg.analysis.statistics import (
    AVERAGE,
    CELL,
    CELLS,
    DIFFERENCES,
    average_ranks,
    draw_counts,
    expected_cells,
    format_mean,
    missing_cells,
    over_datasets,
    paired_differences,
    table_cells,
)
from gsdg.metrics import ACCURACY, Metric
from gsdg.utils.errors import UserError, listing, plural

MOST_NAMED = 4  # run ids, or reasons, listed in one line
PUBLISHED = Path(__file__).with_name("published.csv")
TAG = " (published)"  # appended to a method's name in rows of the paper
SOURCES = {"gsdg": "ours", "domainbed": "DomainBed's", "swad": "in SWAD's format"}
ERROR_NAMES = {
    "population": "mean ± standard error (population form)",
    "sample": "mean ± standard error (sample form)",
}


@dataclass(frozen=True)
class Summary:
    """The numbers of all tables. Every frame has a column `selection`; the selections' rows follow one another.

    Args:
        cells: the tables' numbers, columns `statistics.CELLS`.
        chosen: the selected runs, columns `selection.CHOSEN`.
        missing: the runs that are not in the tables, columns `statistics.MISSING`.
        draws: how many hyper-parameter draws each repetition could choose from, see `statistics.draw_counts`.
        error: form of the standard deviation, a key of `statistics.ERRORS`.
        notes: columns dataset, selection, note; see `caveats`.
        metric: what the numbers are values of.
        on_test: the data sets with runs that are reported on a target's `test` images instead of its `in` split.
    """

    cells: pd.DataFrame
    chosen: pd.DataFrame
    missing: pd.DataFrame
    draws: pd.DataFrame
    error: str = "population"
    notes: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["dataset", "selection", "note"]))
    metric: Metric = ACCURACY
    on_test: frozenset[str] = frozenset()


def report(
    folders: str | Path | Sequence[str | Path],
    selections: Sequence[str] = ("training_domain",),
    run_ids: Iterable[str] | None = None,
    draws: Sequence[str] = (),
) -> str:
    """The tables of the runs in `folders` as text, with the missing runs and what was left out.

    Args:
        folders: folders of runs, or run folders.
        selections: keys of `selection.METHODS`.
        run_ids: only these runs.
        draws: keys of the configs, see `read_runs`.
    """
    runs = read_runs(folders, run_ids, draws)
    return "\n\n".join([*map(text, sheets(summary(runs, selections))), overview(runs, selections)])


def summary(runs: Runs, selections: Sequence[str], *, error: str = "population", unfinished: bool = False) -> Summary:
    """Select steps and draws, and compute the numbers of all tables.

    Args:
        selections: keys of `selection.METHODS`.
        error: form of the standard deviation, population or sample.
        unfinished: include runs that are not done, with the steps that they have recorded.
    """
    for selection in selections:
        if selection not in METHODS:
            raise UserError(f"unknown selection {selection!r}.\nValid: {listing(METHODS)}")
    expected, records, metric = expected_cells(runs.status), runs.finished(unfinished=unfinished), runs.metric
    recorded = set(records["run_id"])
    parts: dict[str, list[pd.DataFrame]] = defaultdict(list)
    draws = {selection: every_draw(records, selection, metric) for selection in selections}
    for selection, rows in draws.items():
        chosen = choose(rows, selection, metric)
        missing = missing_cells(rows, runs.status, expected, selection, metric, recorded)
        parts["cells"].append(table_cells(chosen, expected, selection, error, metric))
        for name, frame in {"chosen": chosen, "missing": missing, "draws": draw_counts(rows)}.items():
            parts[name].append(frame.assign(selection=selection))
    frames = {name: pd.concat(frames, ignore_index=True) for name, frames in parts.items()}
    is_test = records["is_target"] & (records["part"] == "test")
    on_test = frozenset(records.loc[is_test, "dataset"].unique())
    return Summary(**frames, error=error, notes=caveats(runs, draws), metric=metric, on_test=on_test)


def sheets(results: Summary, published: pd.DataFrame | None = None) -> list[Sheet]:
    """One table per data set and selection; with several data sets also one of their averages per selection.

    Args:
        published: rows to show beside the runs', see `read_published`.
    """
    cells, datasets = results.cells, set(results.cells["dataset"])
    if published is not None and datasets & set(published["dataset"]):
        cells = pd.concat([cells, _published_cells(published, cells)], ignore_index=True)
    tables = groups(cells[cells["dataset"].isin(datasets)], "dataset", "selection")
    of_datasets = [_sheet(table, results, *key) for key, table in tables]
    if cells["dataset"].nunique() < 2:
        return of_datasets
    overall = groups(over_datasets(cells), "selection")
    return [*of_datasets, *(_sheet(table, results, "all", selection) for (selection,), table in overall)]


def comparison(results: Summary, baseline: str | None = None) -> list[Sheet]:
    """Paired differences to a baseline, one table per data set and selection; [] if there are no pairs.

    Args:
        baseline: label or algorithm name of a method; None: the first method of each data set.

    Raises:
        UserError: `baseline` is the name of no method, or of several methods of one data set.
    """
    rows = differences(results, baseline)
    return [_comparison(results, table, *key) for key, table in groups(rows, "selection", "dataset")]


def differences(results: Summary, baseline: str | None) -> pd.DataFrame:
    """`statistics.paired_differences` of every selection; no rows if the tables are empty."""
    if results.cells.empty:
        return pd.DataFrame(columns=["selection", *DIFFERENCES])
    expected = results.cells.loc[results.cells["target"] != AVERAGE, CELL].drop_duplicates()
    return paired_differences(results.chosen, expected, baseline, results.metric)


def _comparison(results: Summary, compared: pd.DataFrame, selection: str, dataset: str) -> Sheet:
    targets = [*_targets_in_order(results.cells[results.cells["dataset"] == dataset]["target"]), AVERAGE]
    rows = [
        [
            Entry(name),
            *(Entry(_format_difference(row, target, results.metric)) for target in targets),
            Entry(_format_p(row)),
        ]
        for (name,), row in groups(compared, "algorithm")
    ]
    metric = results.metric
    unit = "percentage points" if metric.percent else f"{metric.name}, lower is better"
    below = [
        f"{unit}, mean of the n pairs of equal target and seeds; [95 % interval, Student's t]; better in k/n",
        "average: the mean of the cells; interval, k/n and p over the n repetitions (seeds) that have every target",
        "p: permutation test on the signs of n differences, two-sided, never below 2^(1-n); n = 1: no interval, no p",
        *_unpaired_results(results, compared, selection, dataset),
    ]
    title = f"{dataset}, {selection}: against {compared['baseline'].iloc[0]}"
    return Sheet(title, ["algorithm", *targets, "p"], rows, below)


def _unpaired_results(results: Summary, compared: pd.DataFrame, selection: str, dataset: str) -> list[str]:
    """A line that lists the cells with fewer pairs than results: their difference is not that of the table's means."""
    table = results.cells[(results.cells["selection"] == selection) & (results.cells["dataset"] == dataset)]
    n_results = table.set_index(["algorithm", "target"])["n"]
    fewer = [
        f"{name} {row['target']} ({row['n']} of {n_results[name, row['target']]})"
        for row in compared[compared["target"] != AVERAGE].to_dict("records")
        for name in (row["algorithm"], row["baseline"])
        if row["n"] < n_results[name, row["target"]]
    ]
    if not fewer:
        return []
    shown = few(dict.fromkeys(fewer), MOST_NAMED)
    return [f"results without a partner of the same seeds are in the table, not here; compared: {shown}"]


def ranking(results: Summary) -> list[Sheet]:
    """The methods by average rank, one table per selection; none for a selection without a cell of every method."""
    tables = []
    for (selection,), cells in groups(results.cells, "selection"):
        ranks = average_ranks(cells, results.metric)
        if ranks.empty:
            continue
        rows = [[Entry(row["algorithm"]), Entry(f"{row['rank']:.2f}")] for row in ranks.to_dict("records")]
        below = [
            f"over the {ranks['cells'].iloc[0]} cells (data set, target) that every method has; "
            "1 is best, means that are printed the same share their rank"
        ]
        tables.append(Sheet(f"average rank, {selection}", ["algorithm", "rank"], rows, below))
    return tables


def chosen_runs(results: Summary, runs: Runs) -> list[Sheet]:
    """The run and step behind each number, one table per data set and selection; with a search also the draw."""
    rows = results.chosen.merge(results.draws).merge(runs.status[["run_id", "drawn"]], on="run_id")
    metric = results.metric
    rows = rows.assign(shown=[f"{metric.scale * value:.{metric.decimals + 1}f}" for value in rows["value"]])
    headers: dict[str, str] = {name: name.replace("_", " ") for name in ("algorithm", "target", "trial_seed", "seed")}
    headers |= {"shown": metric.label, "run_id": "run", "step": "step"}
    draw_headers = {"hparams_seed": "draw", "draws": "of", "drawn": "values"}
    tables = []
    for (dataset, selection), table in groups(rows, "dataset", "selection"):
        columns = headers | (draw_headers if (table["draws"] > 1).any() else {})
        entries = [[Entry(str(value)) for value in row] for row in table[list(columns)].values]
        tables.append(Sheet(f"{dataset}, {selection}: the runs behind the numbers", list(columns.values()), entries))
    return tables


def read_published() -> pd.DataFrame:
    """The paper's averages: columns dataset, algorithm, target ("average"), mean and se in percent, n.

    Source: named in published.csv.
    """
    wide = pd.read_csv(PUBLISHED, comment="#")
    datasets = [column for column in wide if f"{column}_se" in wide]
    long = [
        wide[["algorithm"]].assign(dataset=name.lower(), mean=wide[name], se=wide[f"{name}_se"]) for name in datasets
    ]
    return pd.concat(long, ignore_index=True).assign(target=AVERAGE, n=3)


def csv(cells: pd.DataFrame) -> str:
    """The cells that have a mean, as CSV: columns `statistics.CELLS`, in percent; se is empty for a single run."""
    return cells.loc[cells["mean"].notna(), CELLS].to_csv(index=False, lineterminator="\n", float_format="%.6f")


def missing_lines(missing: pd.DataFrame) -> list[str]:
    """Lines about missing runs: one per algorithm and reason, or, with more than MOST_NAMED reasons, one with counts.

    `missing: <algorithm> <targets> seed <trial seeds>: <reason>`, `missing: <algorithm>: 60 runs: 45 failed, 15 ...`
    """
    lines = []
    for (algorithm,), of_algorithm in groups(missing, "algorithm"):
        if of_algorithm["reason"].nunique() > MOST_NAMED:
            counts = _count_values(of_algorithm["kind"], "; ")
            lines.append(f"missing: {algorithm}: {plural(len(of_algorithm), 'run')}: {counts}")
            continue
        lines += [
            f"missing: {algorithm} {'; '.join(_describe_cells(rows))}: {reason}{_in_parentheses(rows['run_id'])}"
            for (reason,), rows in groups(of_algorithm, "reason")
        ]
    return lines


def lines_below(results: Summary, dataset: str, selection: str) -> list[str]:
    """The lines below a table about its runs: notes, and missing runs."""
    notes, missing = (
        frame[(frame["dataset"] == dataset) & (frame["selection"] == selection)]
        for frame in (results.notes, results.missing)
    )
    return [*notes["note"], *missing_lines(missing)]


def overview(runs: Runs, selections: Sequence[str] = ()) -> str:
    """`read: 64 runs: 60 done | 4 running`, with the code bases if not only GSDG, then the lines of `notes`."""
    status = runs.status
    if status.empty:
        counts = "no runs here yet: a run is a folder with a config.json or a results.jsonl"
    else:
        counts = f"read: {plural(len(status), 'run')}: {_count_values(status['state'], ' | ')}"
    if set(status["source"]) - {"gsdg"}:
        counts += f"; {_count_values(status['source'].map(SOURCES.get), ', ')}"
    return "\n".join(filter(None, [counts, notes(runs, selections)]))


def notes(runs: Runs, selections: Sequence[str] = ()) -> str:
    """Lines about runs that the tables of `selections` do not show, and about everything that could not be read."""
    lines = []
    several = runs.status.loc[runs.status["n_targets"] > 1, "run_id"]
    if len(several) and "leave_one_domain_out" not in selections:
        lines.append(f"note: trained with several targets, only for leave_one_domain_out{_in_parentheses(several)}")
    same_problem = defaultdict(list)
    for name, problem in runs.problems:
        same_problem[problem].append(name)
    return "\n".join(lines + [f"note: {problem}{_in_parentheses(names)}" for problem, names in same_problem.items()])


def _count_values(values: pd.Series, separator: str) -> str:
    """`60 done | 4 running`"""
    return separator.join(f"{n} {value}" for value, n in values.value_counts(sort=False).items())


def _published_cells(published: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """The published rows, repeated for each selection."""
    tagged = published.assign(algorithm=published["algorithm"] + TAG)
    return pd.concat([tagged.assign(selection=selection) for selection in cells["selection"].unique()])[CELLS]


def _sheet(cells: pd.DataFrame, results: Summary, dataset: str, selection: str) -> Sheet:
    """The table of one data set, or of "all", and selection. It has a column `seeds` only if the rows differ in it."""
    seeds, targets = _seed_counts(cells), [*_targets_in_order(cells["target"]), AVERAGE]
    marks = _best_and_second(cells, results.metric)
    rows = []
    for (algorithm,), row in groups(cells, "algorithm"):
        entries = {
            cell["target"]: Entry(
                _format_cell(cell, seeds[algorithm], results.metric), marks.get((algorithm, cell["target"]), "")
            )
            for cell in row.to_dict("records")
        }
        rows.append([Entry(algorithm), *(entries.get(target, Entry("")) for target in targets)])
        rows[-1].append(Entry(str(seeds[algorithm])))
    differ = len({n for name, n in seeds.items() if not name.endswith(TAG)}) > 1
    table = rows if differ else [row[:-1] for row in rows]
    header = ["algorithm", *targets, *(["seeds"] if differ else [])]
    below = [*_legend(cells, results, dataset, selection), *lines_below(results, dataset, selection)]
    return Sheet(f"{dataset}, {selection}", header, table, below)


def _format_cell(cell: dict, seeds: int, metric: Metric) -> str:
    """`93.1 ± 0.4`; without error for a single run; with `(2)` if the cell has fewer seeds than its row.

    Args:
        cell: {column: value}, a row of `Summary.cells`.
    """
    if pd.isna(cell["mean"]):
        return "-"
    number = format_mean(cell["mean"], metric)
    number += "" if pd.isna(cell["se"]) else f" ± {format_mean(cell['se'], metric)}"
    return number if cell["n"] == seeds else f"{number} ({cell['n']})"


def _best_and_second(cells: pd.DataFrame, metric: Metric) -> dict[tuple[str, str], str]:
    """{(algorithm, target): "best" or "second"} by the printed mean; equal means share a mark; one row has no mark."""
    marks = {}
    for (target,), column in groups(cells[cells["mean"].notna()], "target"):
        means = {row["algorithm"]: format_mean(row["mean"], metric) for row in column.to_dict("records")}
        ordered = sorted(set(means.values()), key=float, reverse=not metric.lower_is_better)
        mark_of = dict(zip(ordered, ["best", "second"], strict=False)) if len(means) > 1 else {}
        marks |= {(algorithm, target): mark_of[mean] for algorithm, mean in means.items() if mean in mark_of}
    return marks


def _seed_counts(cells: pd.DataFrame) -> dict[str, int]:
    """{algorithm: the largest number of runs in one of its cells}."""
    return {algorithm: int(n) for algorithm, n in cells.groupby("algorithm", sort=False)["n"].max().items()}


def _legend(cells: pd.DataFrame, results: Summary, dataset: str, selection: str) -> list[str]:
    """The lines below a table that explain its numbers: selection, metric, error, number of seeds."""
    seeds = {n for name, n in _seed_counts(cells).items() if not name.endswith(TAG)}
    error = ERROR_NAMES[results.error] if max(seeds, default=0) > 1 else "no ± for a single seed"
    number = f"; seeds: {seeds.pop()}" if len(seeds) == 1 else ""
    metric = results.metric
    of_draws = _draw_selection(results.draws, dataset, selection, metric)
    lines = [f"selection: {explanation(selection, metric)}{of_draws}"]
    what = f"mean over targets of the {metric.name}" if dataset == "all" else metric.name
    unit = ", %" if metric.percent else ""
    of_all = results.on_test if dataset == "all" else ()
    part = "test images (in split, where it has none)" if results.on_test & {dataset, *of_all} else "in split"
    lines.append(f"{what} on the target's {part}{unit}; {error}{number}")
    if metric is not ACCURACY:
        direction = "lower" if metric.lower_is_better else "higher"
        lines.append(f"{metric.name}: {metric.explained}; {direction} is better, and selections choose by it too")
    counted = cells[(cells["n"] > 0) & ~cells["algorithm"].str.endswith(TAG)]
    if counted.groupby("algorithm")["n"].nunique().max() > 1:
        lines.append("(n): fewer seeds than the rest of the row; of an average, those that have every target")
    if cells["algorithm"].str.endswith(TAG).any():
        lines.append(
            "published: the paper's results (ResNet-18, 3 seeds, gsdg/analysis/published.csv), not runs of this code"
        )
    return lines


def _draw_selection(draws: pd.DataFrame, dataset: str, selection: str, metric: Metric) -> str:
    """How the hyper-parameter draw was selected, as the end of a sentence; "" if there was one draw only."""
    of_table = draws[draws["selection"] == selection]
    counts = of_table.loc[(of_table["dataset"] == dataset) | (dataset == "all"), "draws"]
    if not len(counts) or counts.max() == 1:
        return ""
    if selection == "last":
        return "; of several hyper-parameter draws the lowest (0: the defaults)"
    number = f"{counts.max()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    return f"; then the best of {number} hyper-parameter draws, by the same {metric.name}"


def _targets_in_order(targets: Iterable[str]) -> list[str]:
    return [target for target in dict.fromkeys(targets) if target != AVERAGE]


def _format_difference(rows: pd.DataFrame, target: str, metric: Metric) -> str:
    """`+1.2 [+0.3, +2.1] 3/3`; without interval for a single pair."""
    for row in rows[rows["target"] == target].to_dict("records"):
        difference, low, high = (f"{row[name]:+.{metric.decimals}f}" for name in ("difference", "low", "high"))
        interval = "" if pd.isna(row["low"]) else f" [{low}, {high}]"
        return f"{difference}{interval} {row['better']}/{row['n']}"
    return "-"


def _format_p(rows: pd.DataFrame) -> str:
    """The p value of the average, `0.25`; "-" without one."""
    values = rows.loc[rows["target"] == AVERAGE, "p"].dropna()
    return f"{values.iloc[0]:.2g}" if len(values) else "-"


def _describe_cells(rows: pd.DataFrame) -> list[str]:
    """`art, cartoon seeds 0, 1 draws 1, 2`: the targets and draws of which the same trial seeds are missing.

    Draw 0 alone is not mentioned.
    """
    targets, same = defaultdict(list), defaultdict(list)
    for (target, draw), cells in groups(rows, "target", "hparams_seed"):
        targets[tuple(sorted(set(cells["trial_seed"]))), draw].append(target)
    for (seeds, draw), names in targets.items():
        same[tuple(names), seeds].append(draw)
    return [
        ", ".join(names) + _numbered("seed", seeds) + (_numbered("draw", draws) if any(draws) else "")
        for (names, seeds), draws in same.items()
    ]


def _numbered(word: str, numbers: Sequence[int]) -> str:
    """` seed 0`, ` draws 1, 2`"""
    return f" {word}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _in_parentheses(names: Iterable[str]) -> str:
    """` (a, b, c, d and 2 more)`; "" if no name is given. Runs that do not exist have the name "" and are skipped."""
    given = [name for name in names if name]
    return f" ({few(given, MOST_NAMED)})" if given else ""
