"""Runs -> the figures of a page or a notebook: which rows are shown, and in how many axes. `plots` draws them.

    runs = read_runs("runs")
    found = summary(runs, ["training_domain"])
    curves(runs, found, "pacs", "erm")                      # in a notebook: one picture
    curves(runs, found, "pacs", "erm").save("curves.pdf")   # in a paper

Every function returns `Panels`, which without anything to show say why.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import fill

import pandas as pd

from analysis import drawing, plots
from analysis.drawing import Axes, Figure
from analysis.frames import Runs, diagnostics
from analysis.labels import label
from analysis.run import Run
from analysis.statistics import AVERAGE, PAIR, find_baselines
from analysis.tables import Summary
from gsdg.errors import plural

MOST = 12  # methods in one place: more are not told apart
LEVEL = "chunk"  # at which all methods are compared, whatever their own granularity
AT_LEVEL = f"gradients compared {LEVEL} by {LEVEL}, whatever the method's own granularity"
SETTINGS = {
    "alpha": "algorithm.alpha",
    "n_parts": "algorithm.partition.n_parts",
    "partition": "algorithm.partition.name",
    "rule": "algorithm.rule.name",
}


@dataclass(frozen=True)
class Panels:
    """Axes that belong together: (title, draw(ax)) each, and what a reader should know; of none of them, why."""

    panels: Sequence[tuple[str, Callable[[Axes], Axes]]] = ()
    note: str = ""
    why: str = ""

    def __len__(self) -> int:
        return len(self.panels)

    def __repr__(self) -> str:
        return self.why or f"{len(self)} axes: {', '.join(title for title, _ in self.panels)}"

    def each(self) -> Iterator[tuple[str, bytes]]:
        """(title, PNG), one after the other: a page lays them out as its width allows."""
        for title, draw in self.panels:
            with drawing.style():
                figure, axes = drawing.figure()
                draw(axes[0, 0])
                picture = png(figure, 240)
            yield title, picture

    def figure(self, columns: int = 3) -> Figure | None:
        """One figure with all of them, `columns` in a row."""
        if not self.panels:
            return None
        columns = min(columns, len(self))
        with drawing.style():
            figure, axes = drawing.figure(columns, -(-len(self) // columns))
            for ax in axes.flat[len(self) :]:
                ax.set_axis_off()
            for ax, (title, draw) in zip(axes.flat, self.panels, strict=False):
                draw(ax)
                ax.set_title("\n".join(filter(None, [fill(title, 44), ax.get_title()])))
            if self.note:
                figure.supxlabel(fill(self.note, 62 * columns), fontsize="small")
        return figure

    def save(self, path: str | Path, columns: int = 3) -> None:
        """As PDF, SVG or PNG, by the name's ending."""
        with drawing.style():
            if figure := self.figure(columns):
                figure.savefig(path)

    def _repr_png_(self) -> bytes | None:
        figure = self.figure()
        with drawing.style():
            return figure and png(figure, 120)


def png(figure: Figure, dpi: int) -> bytes:
    """With a palette: a third of the bytes."""
    from PIL import Image  # matplotlib needs it too

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, pil_kwargs={"compress_level": 1})
    Image.open(drawn).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    return small.getvalue()


def curves(runs: Runs, found: Summary, dataset: str, algorithm: str) -> Panels:
    """Accuracy by step of one method, unfinished runs too, the selected steps marked: axes a target.

    Where a hyper-parameter search has drawn, only of the draws that the first selection has chosen.
    """
    records = _of(runs.records, dataset, algorithm)
    picked = _of(found.chosen, dataset, algorithm)
    chosen = dict(iter(picked.groupby("selection", sort=False)))
    records, said = _chosen_draws(records[records["n_targets"] == 1], chosen)
    if records.empty:
        return Panels(why=f"no records yet of {algorithm} on {dataset}")
    panels = [
        (_counted(runs, f"target {target}", rows["run_id"]), partial(plots.accuracy_by_step, rows, chosen=chosen))
        for target, rows in _by_target(records, _of(found.cells, dataset, algorithm))
    ]
    band = (
        f"{algorithm} on {dataset}: mean over runs ± standard deviation; thin: single runs at steps that not all have"
    )
    splits = "; the target's in split is the tables' number; marked: what each selection chose of a run"
    return Panels(panels, band + splits + said)


def best_curves(runs: Runs, found: Summary) -> list[Panels]:
    """`curves` of the best method of every data set."""
    best = {dataset: best_methods(found, dataset)[0][0] for dataset in found.cells["dataset"].unique()}
    return [curves(runs, found, dataset, name) for dataset, name in best.items()]


def best_methods(found: Summary, dataset: str, most: int = MOST) -> tuple[list[str], list[str]]:
    """(shown, left out): the methods by their average, by the first selection, best first, those without one last."""
    cells = found.cells[(found.cells["dataset"] == dataset) & (found.cells["target"] == AVERAGE)]
    averages = cells[cells["selection"] == cells["selection"].iloc[0]] if len(cells) else cells
    names = list(averages.sort_values("mean", ascending=False, kind="stable")["algorithm"])
    return names[:most], names[most:]


def alpha_n_parts(runs: Runs, found: Summary) -> Panels:
    """The heat map of the two knobs, wherever the finished runs of a data set differ in both: axes a data set and
    selection, and whatever else differs between the runs.
    """
    rows = _with_settings(runs, found)
    swept = (SETTINGS["alpha"], SETTINGS["n_parts"], "algorithm.n_parts")
    panels = [
        (title, partial(plots.alpha_n_parts, some))
        for title, some in _groups(runs, rows.dropna(subset=["alpha", "n_parts"]), swept)
        if some["alpha"].nunique() > 1 and some["n_parts"].nunique() > 1
    ]
    why = "" if panels else "no data set has finished runs that differ in algorithm.alpha and algorithm.n_parts"
    return Panels(panels, "mean over targets of the mean over seeds", why)


def granularity(runs: Runs, found: Summary) -> Panels:
    """Accuracy against the partition, a line a rule, wherever the finished runs of a data set differ in the partition:
    axes a data set and selection, and whatever else differs between the runs.
    """
    rows = _with_settings(runs, found).dropna(subset=["partition", "rule"])
    swept = ("algorithm.name", "algorithm._target_", "algorithm.n_parts", "algorithm.partition", "algorithm.rule")
    panels = []
    for title, some in _groups(runs, rows, swept):
        named = some.drop(columns="n_parts").assign(
            partition=_told_apart(runs, some, "partition"), rule=_told_apart(runs, some, "rule")
        )
        several = some["partition"].nunique() > 1 or named["rule"].nunique() > 1  # chunks alone: alpha_n_parts has them
        if several and named["partition"].nunique() > 1:
            panels.append((title, partial(plots.granularity, named)))
    why = "" if panels else "no data set has finished runs that differ in algorithm/partition and algorithm/rule"
    return Panels(panels, "mean over targets, then mean ± standard error over seeds", why)


def paired(found: Summary, x: str, y: str) -> Panels:
    """Accuracy of method `y` against `x`, a point a target and seeds: axes a data set and selection that has both."""
    both = found.chosen[found.chosen["algorithm"].isin([x, y])]
    shared = both.groupby([*PAIR, "selection"])["algorithm"].transform("nunique") == 2
    panels = [
        (f"{dataset}, {selection}: {y} against {x}", partial(plots.paired, rows, x=x, y=y))
        for (dataset, selection), rows in both[shared].groupby(["dataset", "selection"], sort=False)
    ]
    return Panels(panels, why="" if panels else f"{x} and {y} have no finished runs of the same target and seeds")


def pairs(found: Summary, baseline: str | None = None) -> Panels:
    """`paired`, of every data set: its best methods against `baseline`, or, without one, its two methods."""
    wanted: dict[tuple[str, str], None] = {}
    left_out: dict[str, None] = {}
    baselines = find_baselines(found.cells, baseline) if baseline and len(found.cells) else {}
    for dataset in found.cells["dataset"].unique():
        names = list(found.cells.loc[found.cells["dataset"] == dataset, "algorithm"].unique())
        if base := baselines.get(dataset):
            best, others = best_methods(found, dataset)
            wanted |= dict.fromkeys((base, name) for name in best if name != base)
            left_out |= dict.fromkeys(name for name in others if name != base)
        elif baseline is None and len(names) == 2:
            wanted[names[0], names[1]] = None
    if not wanted:
        return Panels(why="name a baseline (--baseline METHOD) that others can be compared with; only two need none")
    made = [paired(found, x, y) for x, y in wanted]
    panels = [panel for some in made for panel in some.panels]
    note = "one point a target and seeds" + (f"; not drawn: {', '.join(left_out)}" if left_out else "")
    return Panels(panels, note, "" if panels else made[0].why)


def conflicts(runs: Runs, diagnosed: pd.DataFrame | None = None) -> Panels:
    """Conflict rate and removed norm by training progress, a line a method: two axes a data set.

    diagnosed: `frames.diagnostics(runs)`, where it has been read already.
    """
    rows = _diagnosed(runs, diagnosed)
    panels, notes = [], ["mean over modules ± standard error over runs", AT_LEVEL]
    for dataset, some in rows.groupby("dataset", sort=False):
        shown, left_out = _few(some["algorithm"])
        notes += [f"not drawn of {dataset}: {', '.join(left_out)}"] * bool(left_out)
        few = some[some["algorithm"].isin(shown)]
        for statistic, said in {"conflict_rate": "conflict rate", "removed_norm_ratio": "removed norm"}.items():
            panels.append((f"{dataset}: {said}", partial(plots.by_progress, few, statistic=statistic, level=LEVEL)))
    return Panels(panels, "; ".join(notes), "" if panels else plots.NO_DIAGNOSTICS)


def conflict_maps(runs: Runs, diagnosed: pd.DataFrame | None = None) -> Panels:
    """The conflict rate by module and step: axes a data set and method, the colours of a data set the same."""
    rows = _diagnosed(runs, diagnosed)
    panels, notes = [], ["mean over runs, the input's module at the top", AT_LEVEL]
    for dataset, some in rows.groupby("dataset", sort=False):
        shown, left_out = _few(some["algorithm"])
        notes += [f"not drawn of {dataset}: {', '.join(left_out)}"] * bool(left_out)
        cells = some.groupby(["algorithm", "module", "step"])["conflict_rate"].mean()
        look = {"level": LEVEL, "vmax": 100 * cells.max()}
        for name in shown:
            one = some[some["algorithm"] == name]
            title = _counted(runs, f"{dataset}, {name}", one["run_id"])
            panels.append((title, partial(plots.conflict_map, one, **look)))
    return Panels(panels, "; ".join(notes), "" if panels else plots.NO_DIAGNOSTICS)


def _of(frame: pd.DataFrame, dataset: str, algorithm: str) -> pd.DataFrame:
    return frame[(frame["dataset"] == dataset) & (frame["algorithm"] == algorithm)]


def _chosen_draws(records: pd.DataFrame, chosen: dict[str, pd.DataFrame]) -> tuple[pd.DataFrame, str]:
    """A mean over draws of which most are thrown away is nobody's accuracy."""
    if records["hparams_seed"].nunique() < 2 or not chosen:
        return records, ""
    selection, picked = next(iter(chosen.items()))
    return records[records["run_id"].isin(picked["run_id"])], f"; of the hyper-parameter draws those {selection} chose"


def _by_target(records: pd.DataFrame, cells: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """In the tables' order."""
    for target in dict.fromkeys([*cells["target"], *records["target"]]):
        rows = records[records["target"] == target]
        if len(rows):
            yield target, rows


def _counted(runs: Runs, what: str, run_ids: pd.Series) -> str:
    """`target a: 3 runs, 1 of them not done`."""
    names = set(run_ids)
    states = runs.status.loc[runs.status["run_id"].isin(names), "state"]
    unfinished = int((states != "done").sum())
    said = f", {unfinished} of them not done" if unfinished else ""
    return f"{what}: {plural(len(names), 'run')}{said}"


def _with_settings(runs: Runs, found: Summary) -> pd.DataFrame:
    """The chosen rows and, as columns, the SETTINGS of their runs; none where a run's is no number and no name."""
    settings = runs.settings(**SETTINGS).set_index("run_id")
    of_run = found.chosen["run_id"]
    return found.chosen.assign(
        **{
            name: of_run.map(
                {run_id: value for run_id, value in column.items() if isinstance(value, int | float | str)}
            )
            for name, column in settings.items()
        }
    )


def _groups(runs: Runs, rows: pd.DataFrame, swept: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """(title, rows) of each data set and selection, those apart whose configs differ in more than what was `swept`.

    Otherwise a cell would mix two learning rates, and the next one would not.
    """
    for (dataset, selection), some in rows.groupby(["dataset", "selection"], sort=False):
        methods = {run_id: _without(runs.methods[run_id], swept) for run_id in some["run_id"]}
        names = some["run_id"].map(_labelled({run_id: ("", method) for run_id, method in methods.items()}))
        for name, group in some.groupby(names, sort=False):
            yield f"{dataset}, {selection}{name}", group


def _without(method: dict[str, str], swept: Sequence[str]) -> dict[str, str]:
    """The method but for `swept`: keys, and all below them."""
    return {key: value for key, value in method.items() if not any(f"{key}.".startswith(f"{some}.") for some in swept)}


def _told_apart(runs: Runs, rows: pd.DataFrame, node: str) -> pd.Series:
    """The names of the rows' partitions or rules, with what tells those of one name apart: chunk (5), chunk (10)."""
    named = {}
    for run_id, name in zip(rows["run_id"], rows[node], strict=True):
        start = f"algorithm.{node}."
        inner = {key.removeprefix(start): text for key, text in runs.configs[run_id].items() if key.startswith(start)}
        named[run_id] = str(name), inner
    return rows["run_id"].map(_labelled(named)).str.replace(" (n_parts=", " (", regex=False)


def _labelled(methods: dict[str, tuple[str, dict[str, str]]]) -> dict[str, str]:
    """{run id: (name, config)} -> {run id: the name, as labels.label makes it}."""
    told = {
        run_id: Run({"source": "", "dataset": "", "algorithm": name}, {}, method, {})
        for run_id, (name, method) in methods.items()
    }
    label(list(told.values()))
    return {run_id: run.facts["algorithm"] for run_id, run in told.items()}


def _diagnosed(runs: Runs, diagnosed: pd.DataFrame | None) -> pd.DataFrame:
    rows = diagnostics(runs, (LEVEL,)) if diagnosed is None else diagnosed
    return rows[(rows["n_targets"] == 1) & (rows["level"] == LEVEL)]


def _few(algorithms: pd.Series) -> tuple[list[str], list[str]]:
    """(shown, left out), in the order of their names."""
    names = sorted(algorithms.unique())
    return names[:MOST], names[MOST:]
