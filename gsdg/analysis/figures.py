"""Runs -> the figures of the report and the notebooks: which rows go into which axes. `plots` draws the axes.

    runs = read_runs("runs")
    results = summary(runs, ["training_domain"])
    curves(runs, results, "pacs", "erm")                      # in a notebook: one picture
    curves(runs, results, "pacs", "erm").save("curves.pdf")   # for a paper

Every function returns `Panels`. If there is nothing to show, `Panels.why` says why.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import fill

import pandas as pd

from gsdg.analysis import plots, style
from gsdg.analysis.read.frames import Runs, diagnostics, domain_cosines
from gsdg.analysis.read.labels import Method, method_labels
from gsdg.analysis.selection import as_text, groups
from gsdg.analysis.statistics import AVERAGE, PAIR, find_baselines
from gsdg.analysis.style import Axes, Figure
from gsdg.analysis.tables import Summary
from gsdg.utils.errors import plural

MOST_METHODS = 12  # in one figure: more could not be distinguished
LEVEL = "chunk"  # granularity of the diagnostics that are shown, for all methods
AT_LEVEL = f"gradients compared {LEVEL} by {LEVEL}, whatever the method's own granularity"
DOMAINS_NAMED = 14  # whose names fit beside axes of the usual height
SETTINGS = {  # column of `_with_settings`: config key
    "alpha": "algorithm.alpha",
    "n_parts": "algorithm.partition.n_parts",
    "partition": "algorithm.partition.name",
    "rule": "algorithm.rule.name",
}


@dataclass(frozen=True)
class Panels:
    """Axes that belong together.

    Args:
        panels: (title, function that draws on the axes it is given) for each of them.
        note: a caption for all of them.
        why: the reason if there are no panels.
        scale: the size of the axes, relative to the usual 3.4 x 2.6 inches.
    """

    panels: Sequence[tuple[str, Callable[[Axes], Axes]]] = ()
    note: str = ""
    why: str = ""
    scale: float = 1

    def __len__(self) -> int:
        return len(self.panels)

    def __repr__(self) -> str:
        return self.why or f"{len(self)} axes: {', '.join(title for title, _ in self.panels)}"

    def each(self) -> Iterator[tuple[str, bytes]]:
        """(title, PNG) of each of the axes, for a page that lays them out itself."""
        for title, draw in self.panels:
            with style.print_style():
                figure, axes = style.figure(scale=self.scale)
                draw(axes[0, 0])
                picture = png(figure, 200)
            yield title, picture

    def figure(self, columns: int = 3) -> Figure | None:
        """One figure with all axes, `columns` in a row; None without axes."""
        if not self.panels:
            return None
        columns = min(columns, len(self))
        with style.print_style():
            figure, axes = style.figure(columns, -(-len(self) // columns), scale=self.scale)
            for ax in axes.flat[len(self) :]:
                ax.set_axis_off()
            for ax, (title, draw) in zip(axes.flat, self.panels, strict=False):
                draw(ax)
                ax.set_title("\n".join(filter(None, [fill(title, 44), ax.get_title()])))
            if self.note:
                figure.supxlabel(fill(self.note, 62 * columns), fontsize="small")
        return figure

    def save(self, path: str | Path, columns: int = 3) -> None:
        """Write all axes as PDF, SVG or PNG, depending on the file's suffix."""
        with style.print_style():
            if figure := self.figure(columns):
                figure.savefig(path)

    def _repr_png_(self) -> bytes | None:
        """How a notebook shows it."""
        figure = self.figure()
        with style.print_style():
            return None if figure is None else png(figure, 120)


def png(figure: Figure, dpi: int) -> bytes:
    """The figure as a PNG with a palette of 128 colours, which takes a third of the bytes."""
    from PIL import Image  # installed with matplotlib

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=dpi, pil_kwargs={"compress_level": 1})
    Image.open(full).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    return small.getvalue()


def curves(runs: Runs, results: Summary, dataset: str, algorithm: str) -> Panels:
    """The metric by step of one method, one axes per target. Unfinished runs are included; selected steps are marked.

    Of a hyper-parameter search, only the draws that the first selection has chosen are shown.
    """
    records = as_text(_rows_of(runs.records, dataset, algorithm))
    chosen_rows = _rows_of(results.chosen, dataset, algorithm)
    chosen = {selection: rows for (selection,), rows in groups(chosen_rows, "selection")}
    records, draw_note = _chosen_draws(records[records["n_targets"] == 1], chosen)
    if records.empty:
        return Panels(why=f"no records yet of {algorithm} on {dataset}")
    panels = [
        (
            _with_run_count(runs, f"target {target}", rows["run_id"]),
            partial(plots.accuracy_by_step, rows, chosen=chosen, metric=runs.metric),
        )
        for target, rows in _by_target(records, _rows_of(results.cells, dataset, algorithm))
    ]
    band = (
        f"{algorithm} on {dataset}: mean over runs ± standard deviation; thin: single runs at steps that not all have"
    )
    splits = (
        f"; the tables show the {runs.metric.name} on the target's in split; marked: the step that each selection chose"
    )
    return Panels(panels, band + splits + draw_note)


def best_curves(runs: Runs, results: Summary) -> list[Panels]:
    """`curves` of the best method of each data set."""
    best = {dataset: best_methods(results, dataset)[0][0] for dataset in results.cells["dataset"].unique()}
    return [curves(runs, results, dataset, name) for dataset, name in best.items()]


def best_methods(results: Summary, dataset: str, most: int = MOST_METHODS) -> tuple[list[str], list[str]]:
    """(the `most` best methods, the others), best first by their average under the first selection.

    Methods without an average come last.
    """
    cells = results.cells[(results.cells["dataset"] == dataset) & (results.cells["target"] == AVERAGE)]
    averages = cells[cells["selection"] == cells["selection"].iloc[0]] if len(cells) else cells
    ordered = averages.sort_values("mean", ascending=results.metric.lower_is_better, kind="stable")
    names = list(ordered["algorithm"])
    return names[:most], names[most:]


def alpha_n_parts(runs: Runs, results: Summary) -> Panels:
    """Heat maps of the metric over alpha and n_parts, from finished runs that differ in both.

    One axes per data set, selection, and combination of the other settings that differ.
    """
    rows = _with_settings(runs, results)
    swept = (SETTINGS["alpha"], SETTINGS["n_parts"], "algorithm.n_parts")
    panels = [
        (title, partial(plots.alpha_n_parts, group, metric=runs.metric))
        for title, group in _groups(runs, rows.dropna(subset=["alpha", "n_parts"]), swept)
        if group["alpha"].nunique() > 1 and group["n_parts"].nunique() > 1
    ]
    why = "" if panels else "no data set has finished runs that differ in algorithm.alpha and algorithm.n_parts"
    return Panels(panels, "mean over targets of the mean over seeds", why)


def granularity(runs: Runs, results: Summary) -> Panels:
    """The metric over the partition with one line per rule, from finished runs that differ in the partition.

    One axes per data set, selection, and combination of the other settings that differ.
    """
    rows = _with_settings(runs, results).dropna(subset=["partition", "rule"])
    swept = ("algorithm.name", "algorithm._target_", "algorithm.n_parts", "algorithm.partition", "algorithm.rule")
    panels = []
    for title, group in _groups(runs, rows, swept):
        labelled = group.drop(columns="n_parts").assign(
            partition=_node_labels(runs, group, "partition"), rule=_node_labels(runs, group, "rule")
        )
        # Runs that differ only in the number of chunks belong to `alpha_n_parts`.
        several = group["partition"].nunique() > 1 or labelled["rule"].nunique() > 1
        if several and labelled["partition"].nunique() > 1:
            panels.append((title, partial(plots.granularity, labelled, metric=runs.metric)))
    why = "" if panels else "no data set has finished runs that differ in algorithm/partition and algorithm/rule"
    return Panels(panels, "mean over targets, then mean ± standard error over seeds", why)


def paired(results: Summary, x: str, y: str) -> Panels:
    """The metric of method `y` over that of `x`: a point per target and seeds, one axes per data set and selection."""
    both = results.chosen[results.chosen["algorithm"].isin([x, y])]
    shared = both.groupby([*PAIR, "selection"])["algorithm"].transform("nunique") == 2
    panels = [
        (f"{dataset}, {selection}: {y} against {x}", partial(plots.paired, rows, x=x, y=y, metric=results.metric))
        for (dataset, selection), rows in groups(both[shared], "dataset", "selection")
    ]
    return Panels(panels, why="" if panels else f"{x} and {y} have no finished runs of the same target and seeds")


def pairs(results: Summary, baseline: str | None = None) -> Panels:
    """`paired` for each data set: its best methods against the baseline; without a baseline, its two methods.

    Args:
        baseline: see `statistics.find_baselines`.
    """
    wanted: dict[tuple[str, str], None] = {}
    left_out: dict[str, None] = {}
    baselines = find_baselines(results.cells, baseline) if baseline and len(results.cells) else {}
    for dataset in results.cells["dataset"].unique():
        names = list(results.cells.loc[results.cells["dataset"] == dataset, "algorithm"].unique())
        if base := baselines.get(dataset):
            best, others = best_methods(results, dataset)
            wanted |= dict.fromkeys((base, name) for name in best if name != base)
            left_out |= dict.fromkeys(name for name in others if name != base)
        elif baseline is None and len(names) == 2:
            wanted[names[0], names[1]] = None
    if not wanted:
        return Panels(why="name a baseline (--baseline METHOD) that others can be compared with; only two need none")
    all_pairs = [paired(results, x, y) for x, y in wanted]
    panels = [panel for pair in all_pairs for panel in pair.panels]
    note = "one point per target and seeds" + (f"; not drawn: {', '.join(left_out)}" if left_out else "")
    return Panels(panels, note, "" if panels else all_pairs[0].why)


def conflicts(runs: Runs, diagnosed: pd.DataFrame | None = None) -> Panels:
    """Conflict rate and removed norm over training progress, one line per method, two axes per data set.

    Args:
        diagnosed: the frame of `frames.diagnostics(runs)`, if it has been read already.
    """
    rows = _diagnosed(runs, diagnosed)
    panels, notes = [], ["mean over modules ± standard error over runs", AT_LEVEL]
    for (dataset,), of_dataset in groups(rows, "dataset"):
        shown, left_out = _first_methods(of_dataset["algorithm"])
        notes += [f"not drawn of {dataset}: {', '.join(left_out)}"] * bool(left_out)
        drawn = of_dataset[of_dataset["algorithm"].isin(shown)]
        for statistic, name in {"conflict_rate": "conflict rate", "removed_norm_ratio": "removed norm"}.items():
            panels.append((f"{dataset}: {name}", partial(plots.by_progress, drawn, statistic=statistic, level=LEVEL)))
    return Panels(panels, "; ".join(notes), "" if panels else plots.NO_DIAGNOSTICS)


def conflict_maps(runs: Runs, diagnosed: pd.DataFrame | None = None) -> Panels:
    """Heat maps of the conflict rate over module and step, one axes per data set and method.

    All methods of a data set have the same colour scale. Args: see `conflicts`.
    """
    rows = _diagnosed(runs, diagnosed)
    panels, notes = [], ["mean over runs, the input's module at the top", AT_LEVEL]
    for (dataset,), of_dataset in groups(rows, "dataset"):
        shown, left_out = _first_methods(of_dataset["algorithm"])
        notes += [f"not drawn of {dataset}: {', '.join(left_out)}"] * bool(left_out)
        cells = of_dataset.groupby(["algorithm", "module", "step"])["conflict_rate"].mean()
        options = {"level": LEVEL, "vmax": 100 * cells.max()}
        for name in shown:
            of_method = of_dataset[of_dataset["algorithm"] == name]
            title = _with_run_count(runs, f"{dataset}, {name}", of_method["run_id"])
            panels.append((title, partial(plots.conflict_map, of_method, **options)))
    return Panels(panels, "; ".join(notes), "" if panels else plots.NO_DIAGNOSTICS)


def conflict_matrices(runs: Runs) -> Panels:
    """Heat maps of the mean cosine between the gradients of each pair of domains, one axes per data set and method."""
    rows = domain_cosines(runs)
    rows = rows[rows["n_targets"] == 1]
    panels, most = [], 0
    notes = ["cosine of the whole model's gradients, mean over steps and runs", "grey: never in one step"]
    for (dataset,), of_dataset in groups(rows, "dataset"):
        shown, left_out = _first_methods(of_dataset["algorithm"])
        notes += [f"not drawn of {dataset}: {', '.join(left_out)}"] * bool(left_out)
        most = max(most, of_dataset["domain_a"].nunique() + 1)
        for name in shown:
            of_method = of_dataset[of_dataset["algorithm"] == name]
            title = _with_run_count(runs, f"{dataset}, {name}", of_method["run_id"])
            panels.append((title, partial(plots.conflict_matrix, of_method)))
    why = "" if panels else plots.NO_DIAGNOSTICS
    return Panels(panels, "; ".join(notes), why, scale=max(1.0, most / DOMAINS_NAMED))


# ---- selecting rows -------------------------------------------------------------------------------------------------


def _rows_of(frame: pd.DataFrame, dataset: str, algorithm: str) -> pd.DataFrame:
    return frame[(frame["dataset"] == dataset) & (frame["algorithm"] == algorithm)]


def _chosen_draws(records: pd.DataFrame, chosen: dict[str, pd.DataFrame]) -> tuple[pd.DataFrame, str]:
    """(the records of the draws that the first selection has chosen, the end of the caption that says so).

    A mean over all draws would be the result of no method, because the other draws are not used.
    """
    if records["hparams_seed"].nunique() < 2 or not chosen:
        return records, ""
    selection, rows = next(iter(chosen.items()))
    return records[records["run_id"].isin(rows["run_id"])], f"; of the hyper-parameter draws those {selection} chose"


def _by_target(records: pd.DataFrame, cells: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(target, its records), in the order of the tables."""
    for target in dict.fromkeys([*cells["target"], *records["target"]]):
        rows = records[records["target"] == target]
        if len(rows):
            yield target, rows


def _with_run_count(runs: Runs, title: str, run_ids: pd.Series) -> str:
    """`target a: 3 runs, 1 of them not done`."""
    distinct = set(run_ids)
    states = runs.status.loc[runs.status["run_id"].isin(distinct), "state"]
    unfinished = int((states != "done").sum())
    suffix = f", {unfinished} of them not done" if unfinished else ""
    return f"{title}: {plural(len(distinct), 'run')}{suffix}"


def _with_settings(runs: Runs, results: Summary) -> pd.DataFrame:
    """The chosen runs with the SETTINGS of their configs as columns; NaN if a value is neither a number nor text."""
    settings = runs.settings(**SETTINGS).set_index("run_id")
    run_ids = results.chosen["run_id"]
    return results.chosen.assign(
        **{
            name: run_ids.map(
                {run_id: value for run_id, value in settings[name].items() if isinstance(value, int | float | str)}
            )
            for name in SETTINGS
        }
    )


def _groups(runs: Runs, rows: pd.DataFrame, swept: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """(title, rows) of each data set and selection; runs whose settings differ in other keys than `swept` are separate.

    Otherwise one cell might mix two learning rates that the next cell does not. The title names these other settings.
    """
    for (dataset, selection), group in groups(rows, "dataset", "selection"):
        others = {run_id: Method("", _without(runs.method_settings[run_id], swept)) for run_id in group["run_id"]}
        for label, same_others in group.groupby(group["run_id"].map(_labels(others)), sort=False):
            yield f"{dataset}, {selection}{label}", same_others


def _without(settings: dict[str, str], keys: Sequence[str]) -> dict[str, str]:
    """The settings without these keys and all keys below them."""
    return {
        key: value for key, value in settings.items() if not any(f"{key}.".startswith(f"{prefix}.") for prefix in keys)
    }


def _node_labels(runs: Runs, rows: pd.DataFrame, node: str) -> pd.Series:
    """The partition or rule of each row, by name and, if several have the same name, by options: chunk (5).

    Args:
        node: "partition" or "rule".
    """
    start = f"algorithm.{node}."
    nodes = {}
    for run_id, name in zip(rows["run_id"], rows[node], strict=True):
        config = runs.configs[run_id]
        options = {key.removeprefix(start): value for key, value in config.items() if key.startswith(start)}
        nodes[run_id] = Method(str(name), options)
    return rows["run_id"].map(_labels(nodes)).str.replace(" (n_parts=", " (", regex=False)


def _labels(methods: dict[str, Method]) -> dict[str, str]:
    """{run_id: method} -> {run_id: label}, see `labels.method_labels`."""
    labels = method_labels(methods.values())
    return {run_id: labels[method] for run_id, method in methods.items()}


def _diagnosed(runs: Runs, diagnosed: pd.DataFrame | None) -> pd.DataFrame:
    """The diagnostics at LEVEL of the runs with one target."""
    rows = diagnostics(runs, (LEVEL,)) if diagnosed is None else diagnosed
    return rows[(rows["n_targets"] == 1) & (rows["level"] == LEVEL)]


def _first_methods(algorithms: pd.Series) -> tuple[list[str], list[str]]:
    """(the first MOST_METHODS methods by name, the others)."""
    names = sorted(algorithms.unique())
    return names[:MOST_METHODS], names[MOST_METHODS:]
