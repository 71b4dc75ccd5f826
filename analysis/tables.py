"""Cells -> text and CSV, and the report that `python -m analysis` and the end of a sweep print."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from analysis.frames import Runs, read_runs
from analysis.selection import EXPLAINED, METHODS
from analysis.statistics import AVERAGE, CELLS, grid, missing_cells, table_cells
from gsdg.errors import UserError, listing

NAMED = 4  # run ids named in one line; of more, only the number is given


def report(
    runs_dir: str | Path, selections: Sequence[str] = ("training_domain",), run_ids: Iterable[str] | None = None
) -> str:
    """The tables of the runs under `runs_dir` (only `run_ids`, if given), what is missing, what was left out."""
    runs = read_runs(runs_dir, run_ids)
    return "\n\n".join(part for part in (text(*summary(runs, selections)), notes(runs)) if part)


def summary(runs: Runs, selections: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(cells, missing) of every selection, one below the other; missing has a column `selection` too."""
    for selection in selections:
        if selection not in METHODS:
            raise UserError(f"unknown selection {selection!r}.\nValid: {listing(METHODS)}")
    expected, finished = grid(runs.status), runs.finished()
    cells, missing = [], []
    for selection in selections:
        chosen = METHODS[selection](finished)
        cells.append(table_cells(chosen, expected, selection))
        missing.append(missing_cells(chosen, runs.status, expected).assign(selection=selection))
    return pd.concat(cells, ignore_index=True), pd.concat(missing, ignore_index=True)


def csv(cells: pd.DataFrame) -> str:
    """Columns CELLS, percent; se is empty for a single run; a cell without a run has no line."""
    return cells.loc[cells["n"] > 0, CELLS].to_csv(index=False, lineterminator="\n", float_format="%.6f")


def text(cells: pd.DataFrame, missing: pd.DataFrame) -> str:
    """One aligned table a dataset and selection, below it what is shown and which cells are missing."""
    tables = []
    for (dataset, selection), table in cells.groupby(["dataset", "selection"], sort=False):
        gaps = missing[(missing["dataset"] == dataset) & (missing["selection"] == selection)]
        tables.append("\n".join([f"{dataset}, {selection}", *_table(table), *_legend(table), *missing_lines(gaps)]))
    return "\n\n".join(tables)


def missing_lines(missing: pd.DataFrame) -> list[str]:
    """`missing: <algorithm> <targets> seed <trial seeds>: <reason>`, a line per algorithm and reason."""
    return [
        f"missing: {algorithm} {'; '.join(_where(rows))}: {reason}{_runs_named(rows['run_id'])}"
        for (algorithm, reason), rows in missing.groupby(["algorithm", "reason"], sort=False)
    ]


def notes(runs: Runs) -> str:
    """What was read but not shown, and what could not be read, a line per kind."""
    lines = [] if len(runs.status) else ["no runs here yet: a run is a folder with a config.json"]
    several = runs.status.loc[runs.status["n_targets"] > 1, "run_id"]
    if len(several):
        lines.append(f"note: trained with several targets, not in the tables{_runs_named(several)}")
    found = defaultdict(list)
    for name, problem in runs.problems:
        found[problem].append(name)
    return "\n".join(lines + [f"note: {problem}{_runs_named(names)}" for problem, names in found.items()])


def _table(cells: pd.DataFrame) -> list[str]:
    """Header and rows, columns aligned; a column `seeds` only where the rows differ in it."""
    seeds = _seeds(cells)
    targets = [target for target in dict.fromkeys(cells["target"]) if target != AVERAGE] + [AVERAGE]
    rows = [["algorithm", *targets, "seeds"]]
    for algorithm, row in cells.groupby("algorithm", sort=False):
        shown = {cell.target: _cell(cell.mean, cell.se, cell.n, seeds[algorithm]) for cell in row.itertuples()}
        rows.append([algorithm, *(shown.get(target, "") for target in targets), str(seeds[algorithm])])
    if len(set(seeds.values())) == 1:
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_line(row, widths) for row in rows]


def _line(row: list[str], widths: list[int]) -> str:
    label, *numbers = zip(row, widths, strict=True)
    return "  ".join([label[0].ljust(label[1]), *(number.rjust(width) for number, width in numbers)])


def _cell(mean: float, se: float, n: int, seeds: int) -> str:
    """`93.1 ± 0.4`; a single run has no error; `(2)` where the rest of the row has more seeds."""
    if n == 0:
        return "-"
    shown = f"{mean:.1f} ± {se:.1f}" if n > 1 else f"{mean:.1f}"
    return shown if n == seeds else f"{shown} ({n})"


def _seeds(cells: pd.DataFrame) -> dict[str, int]:
    """{algorithm: the most runs that one of its cells has}."""
    return {algorithm: int(n) for algorithm, n in cells.groupby("algorithm", sort=False)["n"].max().items()}


def _legend(cells: pd.DataFrame) -> list[str]:
    """How the step was selected, what the numbers are, how many seeds stand behind them."""
    seeds = set(_seeds(cells).values())
    error = "mean ± standard error (population form)" if max(seeds) > 1 else "no ± for a single seed"
    number = f"; seeds: {seeds.pop()}" if len(seeds) == 1 else ""
    lines = [f"selection: {EXPLAINED[cells['selection'].iloc[0]]}"]
    lines.append(f"accuracy on the target's in split, %; {error}{number}")
    if cells[cells["n"] > 0].groupby("algorithm")["n"].nunique().max() > 1:
        lines.append(
            "(n): fewer seeds than the rest of the row; an average takes only the seeds that have every target"
        )
    return lines


def _where(rows: pd.DataFrame) -> list[str]:
    """`art, cartoon seeds 0, 1`: the targets that lack the same trial seeds together."""
    targets = defaultdict(list)
    for target, seeds in rows.groupby("target", sort=False)["trial_seed"]:
        targets[tuple(sorted(set(seeds)))].append(target)
    return [f"{', '.join(names)} seed{'s' * (len(s) > 1)} {', '.join(map(str, s))}" for s, names in targets.items()]


def _runs_named(run_ids: Iterable[str]) -> str:
    names = [name for name in run_ids if name]
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f" ({', '.join(names[:NAMED])}{more})"
