"""Runs -> cells -> the tables that `python -m analysis` and the end of a sweep print, laid out as `formats.Sheet`s."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from analysis.caveats import caveats
from analysis.formats import Entry, Sheet, few, text
from analysis.frames import Runs, read_runs
from analysis.selection import EXPLAINED, METHODS, choose, every_draw
from analysis.statistics import (
    AVERAGE,
    CELL,
    CELLS,
    DIFFERENCES,
    average_ranks,
    draw_counts,
    grid,
    missing_cells,
    over_datasets,
    paired_differences,
    printed,
    table_cells,
)
from gsdg.errors import UserError, listing, plural

NAMED = 4  # run ids named in one line; of more, only the number is given
PUBLISHED = Path(__file__).with_name("published.csv")
TAG = " (published)"
SOURCES = {"gsdg": "ours", "domainbed": "DomainBed's", "swad": "in SWAD's dialect"}
ERROR_NAMES = {
    "population": "mean ± standard error (population form)",
    "sample": "mean ± standard error (sample form)",
}


@dataclass(frozen=True)
class Summary:
    """Of every selection, one below the other: cells (statistics.CELLS), chosen and missing rows with `selection`.

    draws: how many hyper-parameter draws each repetition could choose from. error: a key of statistics.ERRORS.
    notes: columns dataset, selection, note: what a reader should know of the runs, see `caveats`.
    """

    cells: pd.DataFrame
    chosen: pd.DataFrame
    missing: pd.DataFrame
    draws: pd.DataFrame
    error: str = "population"
    notes: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["dataset", "selection", "note"]))


def report(
    folders: str | Path | Sequence[str | Path],
    selections: Sequence[str] = ("training_domain",),
    run_ids: Iterable[str] | None = None,
) -> str:
    """The tables of the runs in `folders` (only `run_ids`, if given), what is missing, what was left out."""
    runs = read_runs(folders, run_ids)
    return "\n\n".join([*map(text, sheets(summary(runs, selections))), account(runs, selections)])


def summary(runs: Runs, selections: Sequence[str], *, error: str = "population", unfinished: bool = False) -> Summary:
    """What the tables are made of. `unfinished`: runs count that are not done, with what they have recorded."""
    for selection in selections:
        if selection not in METHODS:
            raise UserError(f"unknown selection {selection!r}.\nValid: {listing(METHODS)}")
    expected, records = grid(runs.status), runs.finished(unfinished=unfinished)
    parts: dict[str, list[pd.DataFrame]] = defaultdict(list)
    draws = {selection: every_draw(records, selection) for selection in selections}
    for selection, rows in draws.items():
        chosen = choose(rows, selection)
        missing = missing_cells(rows, runs.status, expected, selection)
        parts["cells"].append(table_cells(chosen, expected, selection, error))
        for name, frame in {"chosen": chosen, "missing": missing, "draws": draw_counts(rows)}.items():
            parts[name].append(frame.assign(selection=selection))
    whole = {name: pd.concat(frames, ignore_index=True) for name, frames in parts.items()}
    return Summary(**whole, error=error, notes=caveats(runs, draws))


def sheets(found: Summary, published: pd.DataFrame | None = None) -> list[Sheet]:
    """A table a data set and selection, then, of several data sets, their averages; `published` rows beside them."""
    cells, ours = found.cells, set(found.cells["dataset"])
    if published is not None and ours & set(published["dataset"]):
        cells = pd.concat([cells, _beside(published, cells)], ignore_index=True)
    tables = cells[cells["dataset"].isin(ours)].groupby(["dataset", "selection"], sort=False)
    of_datasets = [_sheet(table, found, *key) for key, table in tables]
    if cells["dataset"].nunique() < 2:
        return of_datasets
    overall = over_datasets(cells).groupby("selection", sort=False)
    return [*of_datasets, *(_sheet(table, found, "all", selection) for selection, table in overall)]


def comparison(found: Summary, baseline: str | None = None) -> list[Sheet]:
    """Every method against `baseline`, or each data set's first: paired differences, a table a data set and selection.

    None without a pair. UserError where `baseline` names no method, or several.
    """
    rows = differences(found, baseline)
    return [_comparison(found, table, *key) for key, table in rows.groupby(["selection", "dataset"], sort=False)]


def differences(found: Summary, baseline: str | None) -> pd.DataFrame:
    """`statistics.paired_differences` of every selection; no rows where no method has a row in a table."""
    if found.cells.empty:
        return pd.DataFrame(columns=["selection", *DIFFERENCES])
    expected = found.cells.loc[found.cells["target"] != AVERAGE, CELL].drop_duplicates()
    return paired_differences(found.chosen, expected, baseline)


def _comparison(found: Summary, compared: pd.DataFrame, selection: str, dataset: str) -> Sheet:
    targets = [*_in_order(found.cells[found.cells["dataset"] == dataset]["target"]), AVERAGE]
    rows = [
        [Entry(name), *(Entry(_difference(row, target)) for target in targets), Entry(_p_value(row))]
        for name, row in compared.groupby("algorithm", sort=False)
    ]
    below = [
        "percentage points, mean of the n pairs of equal target and seeds; [95 % interval, Student's t]; better in k/n",
        "average: the mean of the cells; interval, k/n and p over the n repetitions (seeds) that have every target",
        "p: permutation test on the signs of n differences, two-sided, never below 2^(1-n); n = 1: no interval, no p",
        *_without_partner(found, compared, selection, dataset),
    ]
    title = f"{dataset}, {selection}: against {compared['baseline'].iloc[0]}"
    return Sheet(title, ["algorithm", *targets, "p"], rows, below)


def _without_partner(found: Summary, compared: pd.DataFrame, selection: str, dataset: str) -> list[str]:
    """Which cells of the table hold more results than were compared, so that the difference is not the table's."""
    table = found.cells[(found.cells["selection"] == selection) & (found.cells["dataset"] == dataset)]
    results = table.set_index(["algorithm", "target"])["n"]
    unequal = [
        f"{name} {row.target} ({row.n} of {results[name, row.target]})"
        for row in compared[compared["target"] != AVERAGE].itertuples()
        for name in (row.algorithm, row.baseline)
        if row.n < results[name, row.target]
    ]
    shown = few(dict.fromkeys(unequal), NAMED)
    return [f"results without a partner of the same seeds are in the table, not here; compared: {shown}"] * bool(
        unequal
    )


def ranking(found: Summary) -> list[Sheet]:
    """The methods by average rank, a table a selection; none where no cell has a result of every method."""
    made = []
    for selection, cells in found.cells.groupby("selection", sort=False):
        ranks = average_ranks(cells)
        if ranks.empty:
            continue
        rows = [[Entry(row.algorithm), Entry(f"{row.rank:.2f}")] for row in ranks.itertuples()]
        below = [
            f"over the {ranks['cells'].iloc[0]} cells (data set, target) that every method has; "
            "1 is best, means that are printed alike share"
        ]
        made.append(Sheet(f"average rank, {selection}", ["algorithm", "rank"], rows, below))
    return made


def chosen_runs(found: Summary, runs: Runs) -> list[Sheet]:
    """The run and step behind every number, a table a data set and selection; of a search, the draw and its values."""
    rows = found.chosen.merge(found.draws).merge(runs.status[["run_id", "drawn"]], on="run_id")
    rows = rows.assign(percent=[f"{100 * value:.2f}" for value in rows["accuracy"]])
    shown = {name: name.replace("_", " ") for name in ("algorithm", "target", "trial_seed", "seed")}
    shown |= {"percent": "accuracy, %", "run_id": "run", "step": "step"}
    of_draw = {"hparams_seed": "draw", "draws": "of", "drawn": "values"}
    made = []
    for (dataset, selection), table in rows.groupby(["dataset", "selection"], sort=False):
        columns = shown | (of_draw if (table["draws"] > 1).any() else {})
        entries = [[Entry(str(value)) for value in row] for row in table[list(columns)].values]
        made.append(Sheet(f"{dataset}, {selection}: the runs behind the numbers", list(columns.values()), entries))
    return made


def read_published() -> pd.DataFrame:
    """The paper's table: dataset, algorithm, target "average", mean, se, n, in percent. Its source is in the file."""
    wide = pd.read_csv(PUBLISHED, comment="#")
    datasets = [column for column in wide if f"{column}_se" in wide]
    long = [
        wide[["algorithm"]].assign(dataset=name.lower(), mean=wide[name], se=wide[f"{name}_se"]) for name in datasets
    ]
    return pd.concat(long, ignore_index=True).assign(target=AVERAGE, n=3)


def csv(cells: pd.DataFrame) -> str:
    """Columns CELLS, percent; se is empty for a single run; a cell without a run, or its row's average, has no line."""
    return cells.loc[cells["mean"].notna(), CELLS].to_csv(index=False, lineterminator="\n", float_format="%.6f")


def missing_lines(missing: pd.DataFrame) -> list[str]:
    """`missing: <algorithm> <targets> seed <trial seeds>: <reason>`, a line per algorithm and reason."""
    return [
        f"missing: {algorithm} {'; '.join(_where(rows))}: {reason}{_runs_named(rows['run_id'])}"
        for (algorithm, reason), rows in missing.groupby(["algorithm", "reason"], sort=False)
    ]


def lines_below(found: Summary, dataset: str, selection: str) -> list[str]:
    """What a reader should know of a table's runs, and which are missing."""
    notes, missing = (
        frame[(frame["dataset"] == dataset) & (frame["selection"] == selection)]
        for frame in (found.notes, found.missing)
    )
    return [*notes["note"], *missing_lines(missing)]


def account(runs: Runs, selections: Sequence[str] = ()) -> str:
    """`read: 64 runs: 60 done | 4 running`, and whose they are if not only ours; then the `notes`."""
    status = runs.status
    if status.empty:
        said = "no runs here yet: a run is a folder with a config.json or a results.jsonl"
    else:
        said = f"read: {plural(len(status), 'run')}: {_counted(status['state'], ' | ')}"
    of = f"; {_counted(status['source'].map(SOURCES.get), ', ')}" if set(status["source"]) - {"gsdg"} else ""
    return "\n".join(filter(None, [said + of, notes(runs, selections)]))


def notes(runs: Runs, selections: Sequence[str] = ()) -> str:
    """What is not shown in tables of `selections`, and what could not be read, a line per kind."""
    lines = []
    several = runs.status.loc[runs.status["n_targets"] > 1, "run_id"]
    if len(several) and "leave_one_domain_out" not in selections:
        lines.append(f"note: trained with several targets, only for leave_one_domain_out{_runs_named(several)}")
    found = defaultdict(list)
    for name, problem in runs.problems:
        found[problem].append(name)
    return "\n".join(lines + [f"note: {problem}{_runs_named(names)}" for problem, names in found.items()])


def _counted(values: pd.Series, between: str) -> str:
    return between.join(f"{n} {value}" for value, n in values.value_counts(sort=False).items())


def _beside(published: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """The published rows for every selection's tables."""
    named = published.assign(algorithm=published["algorithm"] + TAG)
    return pd.concat([named.assign(selection=selection) for selection in cells["selection"].unique()])[CELLS]


def _sheet(cells: pd.DataFrame, found: Summary, dataset: str, selection: str) -> Sheet:
    """A column `seeds` only where the rows differ in it."""
    seeds, targets = _seeds(cells), [*_in_order(cells["target"]), AVERAGE]
    marks = _marks(cells)
    rows = []
    for algorithm, row in cells.groupby("algorithm", sort=False):
        shown = {
            cell.target: Entry(_cell(cell, seeds[algorithm]), marks.get((algorithm, cell.target), ""))
            for cell in row.itertuples()
        }
        rows.append([Entry(algorithm), *(shown.get(target, Entry("")) for target in targets)])
        rows[-1].append(Entry(str(seeds[algorithm])))
    ours = {name: n for name, n in seeds.items() if not name.endswith(TAG)}
    differ = len(set(ours.values())) > 1
    table = rows if differ else [row[:-1] for row in rows]
    header = ["algorithm", *targets, *(["seeds"] if differ else [])]
    below = [*_legend(cells, found, dataset, selection), *lines_below(found, dataset, selection)]
    return Sheet(f"{dataset}, {selection}", header, table, below)


def _cell(cell: object, seeds: int) -> str:
    """`93.1 ± 0.4`; a single run has no error; `(2)` where the rest of the row has more seeds."""
    if pd.isna(cell.mean):
        return "-"
    shown = printed(cell.mean) if pd.isna(cell.se) else f"{printed(cell.mean)} ± {cell.se:.1f}"
    return shown if cell.n == seeds else f"{shown} ({cell.n})"


def _marks(cells: pd.DataFrame) -> dict[tuple[str, str], str]:
    """{(algorithm, target): best or second} by the printed mean, equals together; none where a column has one row."""
    found = {}
    for target, column in cells[cells["mean"].notna()].groupby("target", sort=False):
        means = {row.algorithm: printed(row.mean) for row in column.itertuples()}
        ordered = sorted(set(means.values()), key=float, reverse=True)
        names = dict(zip(ordered, ["best", "second"], strict=False)) if len(means) > 1 else {}
        found |= {(algorithm, target): names[mean] for algorithm, mean in means.items() if mean in names}
    return found


def _seeds(cells: pd.DataFrame) -> dict[str, int]:
    """{algorithm: the most runs that one of its cells has}."""
    return {algorithm: int(n) for algorithm, n in cells.groupby("algorithm", sort=False)["n"].max().items()}


def _legend(cells: pd.DataFrame, found: Summary, dataset: str, selection: str) -> list[str]:
    """How step and draw were selected, what the numbers are, how many seeds stand behind them."""
    seeds = {n for name, n in _seeds(cells).items() if not name.endswith(TAG)}
    error = ERROR_NAMES[found.error] if max(seeds, default=0) > 1 else "no ± for a single seed"
    number = f"; seeds: {seeds.pop()}" if len(seeds) == 1 else ""
    lines = [f"selection: {EXPLAINED[selection]}{_draws_said(found.draws, dataset, selection)}"]
    what = "mean over targets of the accuracy" if dataset == "all" else "accuracy"
    lines.append(f"{what} on the target's in split, %; {error}{number}")
    counted = cells[(cells["n"] > 0) & ~cells["algorithm"].str.endswith(TAG)]
    if counted.groupby("algorithm")["n"].nunique().max() > 1:
        lines.append("(n): fewer seeds than the rest of the row; of an average, those that have every target")
    if cells["algorithm"].str.endswith(TAG).any():
        lines.append(
            "published: the paper's figures (ResNet-18, 3 seeds, analysis/published.csv), not runs of this code"
        )
    return lines


def _draws_said(draws: pd.DataFrame, dataset: str, selection: str) -> str:
    of_table = draws[draws["selection"] == selection]
    counts = of_table.loc[(of_table["dataset"] == dataset) | (dataset == "all"), "draws"]
    if not len(counts) or counts.max() == 1:
        return ""
    if selection == "last":
        return "; of several hyper-parameter draws the lowest (0: the defaults)"
    number = f"{counts.max()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    return f"; then the best of {number} hyper-parameter draws, by the same accuracy"


def _in_order(targets: Iterable[str]) -> list[str]:
    return [target for target in dict.fromkeys(targets) if target != AVERAGE]


def _difference(rows: pd.DataFrame, target: str) -> str:
    """`+1.2 [+0.3, +2.1] 3/3`; a single pair has no interval."""
    for row in rows[rows["target"] == target].itertuples():
        interval = "" if pd.isna(row.low) else f" [{row.low:+.1f}, {row.high:+.1f}]"
        return f"{row.difference:+.1f}{interval} {row.better}/{row.n}"
    return "-"


def _p_value(rows: pd.DataFrame) -> str:
    """Of the average: `0.25`; "-" without one."""
    values = rows.loc[rows["target"] == AVERAGE, "p"].dropna()
    return f"{values.iloc[0]:.2g}" if len(values) else "-"


def _where(rows: pd.DataFrame) -> list[str]:
    """`art, cartoon seeds 0, 1`: the targets that lack the same trial seeds together; of draws, `draw 3` with them."""
    targets = defaultdict(list)
    for (target, draw), seeds in rows.groupby(["target", "hparams_seed"], sort=False)["trial_seed"]:
        targets[tuple(sorted(set(seeds))), draw].append(target)
    return [
        f"{', '.join(names)} seed{'s' * (len(s) > 1)} {', '.join(map(str, s))}{f' draw {draw}' if draw else ''}"
        for (s, draw), names in targets.items()
    ]


def _runs_named(run_ids: Iterable[str]) -> str:
    names = [name for name in run_ids if name]
    return f" ({few(names, NAMED)})" if names else ""
