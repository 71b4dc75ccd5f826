"""Plots, each a function (frame, ax) -> ax that draws on the axes it is given and on nothing else.

    with drawing.style():
        fig, axes = drawing.figure()
        accuracy_by_step(records, axes[0, 0])
        fig.savefig("sketch.pdf")

Accuracies are in percent, standard deviations and errors in the population form, as in the tables. A frame with nothing
to show gives axes that say what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import cycle
from textwrap import fill

import numpy as np
import pandas as pd

from analysis.drawing import (
    Axes,
    add_grid,
    colour_bar,
    draw_line,
    edges_of,
    finish,
    hatch_empty,
    legend_entries,
    make_square,
    nothing_to_show,
    series_look,
    shown_as,
    thinned_ticks,
    turned_ticks,
    wrapped,
    write_values,
)
from analysis.labels import natural
from analysis.statistics import PAIR
from gsdg.errors import UserError, listing

SELECTED = [("s", 40), ("o", 40), ("D", 14), ("^", 34), ("v", 34), ("x", 14)]  # hollow: several may pick one point
COLOUR_MAP = "cividis"
STATISTICS = {  # column of the diagnostics: label, factor
    "conflict_rate": ("conflicting pairs, %", 100),
    "cosine": ("mean cosine", 1),
    "removed_norm_ratio": ("removed norm, %", 100),
}
GRANULARITIES = ["model", "module", "tensor", "chunk", "filter", "element"]  # coarse to fine
CHUNKS = 10  # n_parts of conf/algorithm/partition/chunk.yaml
NO_CHOSEN = "no finished runs to choose from"
NO_DIAGNOSTICS = "no diagnostics: run with algorithm.diagnostics=true"


def accuracy_by_step(
    records: pd.DataFrame,
    ax: Axes,
    chosen: Mapping[str, pd.DataFrame] | None = None,
    *,
    target_part: str = "in",
    source_part: str = "out",
) -> Axes:
    """A line per domain, the target's heavier: mean over runs +- standard deviation, where every run has a value. The
    steps that a run lacks, because it stopped early for example, are drawn run by run, thin.

    `records` are one method's and target's. The target is shown on the split that the tables report, the sources on the
    one that training-domain validation looks at. `chosen`, {selection method: its frame}, marks the chosen steps on the
    target's curve of each run.
    """
    columns = ["run_id", "step", "domain", "is_target", "part", "accuracy"]
    if lacking := _lacking(records, columns, "no records"):
        return nothing_to_show(ax, lacking)
    _require_one(records, ["dataset", "algorithm", "target"])
    shown = records[records["part"] == np.where(records["is_target"], target_part, source_part)]
    if shown.empty:
        return nothing_to_show(ax, f"no accuracies: neither the target's {target_part} nor the sources' {source_part}")
    runs = records["run_id"].nunique()
    for number, (domain, rows) in enumerate(_each(shown, "domain")):
        target = bool(rows["is_target"].any())
        label = f"{domain} ({f'target, {target_part}' if target else source_part} split)"
        look = {"linewidth": 2.2, "linestyle": "-", "zorder": 3} if target else {"linewidth": 1.0}
        whole, partly = _of_every_run(rows, ["step"], runs)
        curve = _spread(100 * whole["accuracy"], whole["step"])
        draw_line(ax, curve, curve["std"], number, label=label, **look)
        thin = {"color": series_look(number)["color"], "linewidth": 0.5, "alpha": 0.6}
        for _, run in _each(partly.sort_values("step"), "run_id"):
            ax.plot(run["step"], 100 * run["accuracy"], marker="." if len(run) == 1 else "", **thin)
    _mark_selected(shown, ax, chosen or {})
    ax.set(xlabel="training step", ylabel="accuracy, %")
    return finish(ax)


def alpha_n_parts(chosen: pd.DataFrame, ax: Axes) -> Axes:
    """Heat map of the accuracy at every (alpha, n_parts): the mean over targets of each target's mean over runs.

    A cell is hatched and has neither colour nor number where a target is missing that another cell has: means over
    different targets cannot be compared. A star marks fewer runs than the fullest cell has.
    """
    columns = ["alpha", "n_parts", "target", "accuracy"]
    if lacking := _lacking(chosen, columns, NO_CHOSEN):
        return nothing_to_show(ax, lacking)
    rows = (
        chosen[columns]
        .dropna()
        .assign(alpha=lambda r: _comparable(r["alpha"]), n_parts=lambda r: _comparable(r["n_parts"]))
    )
    by_target = rows.groupby(["alpha", "n_parts", "target"])["accuracy"].mean().unstack()
    if (complete := by_target.dropna()).empty:
        return nothing_to_show(ax, f"no cell has all the targets: {listing(by_target.columns)}")
    means = (100 * by_target.mean(axis=1, skipna=False)).unstack()
    runs = rows.groupby(["alpha", "n_parts"]).size().unstack().where(means.notna())
    image = ax.imshow(np.ma.masked_invalid(means), cmap=COLOUR_MAP, aspect="auto", interpolation="nearest")
    fewer = (runs < runs.max().max()).to_numpy()
    write_values(ax, image, means.to_numpy(), fewer)
    hatch_empty(ax, means.isna().to_numpy())
    thinned_ticks(ax.xaxis, means.columns, 0.8 * ax.bbox.width)  # the colour bar takes the rest
    thinned_ticks(ax.yaxis, means.index, ax.bbox.height)
    notes = ["* fewer runs"] * bool(fewer.any()) + ["hatched: lacks a target"] * (len(complete) < len(by_target))
    ax.set(xlabel=f"n_parts ({', '.join(notes)})" if notes else "n_parts", ylabel="alpha")
    return colour_bar(ax, image, "accuracy, %")


def granularity(chosen: pd.DataFrame, ax: Axes, order: Sequence[str] | None = None) -> Axes:
    """Accuracy against `partition`, coarse to fine or in `order`, a line per `rule`: mean and standard error over the
    repetitions (trial seed, seed), each the mean over all targets; a repetition that lacks a target is left out.
    """
    columns = ["rule", "partition", *PAIR, "accuracy"]
    if lacking := _lacking(chosen, columns, NO_CHOSEN):
        return nothing_to_show(ax, lacking)
    rows = chosen.assign(partition=_partitions(chosen)).dropna(subset=columns)
    points, left_out = _over_repetitions(rows, ["rule", "partition"])
    if points.empty:
        return nothing_to_show(ax, f"no repetition has all the targets: {listing(rows['target'].unique())}")
    names = _by_fineness(points["partition"].unique(), order)
    rules = list(dict.fromkeys(points["rule"]))
    for number, rule in enumerate(rules):
        dodge = (number - (len(rules) - 1) / 2) * min(0.12, 0.7 / len(rules))
        line = points[points["rule"] == rule].set_index("partition").reindex(names).reset_index()
        line.index = line.index + dodge
        line = line[line["mean"].notna()]
        errors = line["error"] if line["error"].notna().any() else None
        ax.errorbar(line.index, line["mean"], yerr=errors, label=str(rule), capsize=1.5, **series_look(number))
    note = f"\n({left_out} left out: a target is missing)" if left_out else ""
    ax.set(xlabel=f"granularity, coarse to fine{note}", ylabel="accuracy, %", xlim=(-0.5, len(names) - 0.5))
    turned_ticks(ax, names)
    return finish(ax)


def by_progress(
    diagnostics: pd.DataFrame, ax: Axes, statistic: str = "conflict_rate", level: str = "chunk", bins: int = 10
) -> Axes:
    """The mean over modules in bins of training progress, a line per algorithm: mean +- standard error over runs, in
    the bins in which every run of the algorithm has a value.
    """
    columns = ["run_id", "algorithm", "level", "step", "steps", statistic]
    if lacking := _lacking(diagnostics, columns, NO_DIAGNOSTICS):
        return nothing_to_show(ax, lacking)
    rows = diagnostics[diagnostics["level"] == level].dropna(subset=columns)
    if rows.empty:
        return nothing_to_show(ax, f"no diagnostics at the granularity {level}")
    label, factor = STATISTICS.get(statistic, (statistic, 1))
    width = 100 / bins
    place = (rows["step"] * bins // rows["steps"]).clip(upper=bins - 1)
    rows = rows.assign(progress=(place + 0.5) * width, value=factor * rows[statistic])
    # sorted, for runs come in the order of their ids: a method should keep its colour when runs are added
    for number, algorithm in enumerate(sorted(rows["algorithm"].unique(), key=natural)):
        found = rows[rows["algorithm"] == algorithm]
        steps = found.groupby(["run_id", "progress", "step"], observed=True)["value"].mean()
        runs = steps.groupby(["run_id", "progress"], observed=True).mean().reset_index()
        whole, _ = _of_every_run(runs, ["progress"], found["run_id"].nunique())
        curve = _spread(whole["value"], whole["progress"])
        draw_line(ax, curve, curve["error"], number, label=str(algorithm))
    ax.set(xlabel="training progress, %", ylabel=label, xlim=(0, 100))
    return finish(ax)


def conflict_map(
    diagnostics: pd.DataFrame,
    ax: Axes,
    statistic: str = "conflict_rate",
    level: str = "chunk",
    vmax: float | None = None,
) -> Axes:
    """Heat map module x step of one method, mean over runs, the input's module at the top; of the steps that every run
    has logged. vmax, in the colour bar's unit, makes two maps comparable.
    """
    columns = ["run_id", "level", "module", "step", statistic]
    if lacking := _lacking(diagnostics, columns, NO_DIAGNOSTICS):
        return nothing_to_show(ax, lacking)
    _require_one(diagnostics, ["dataset", "algorithm"])
    rows = diagnostics[diagnostics["level"] == level].dropna(subset=columns)
    if rows.empty:
        return nothing_to_show(ax, f"no diagnostics at the granularity {level}")
    rows, _ = _of_every_run(rows, ["step"], rows["run_id"].nunique())
    if rows.empty:
        return nothing_to_show(ax, "no step that every run has logged")
    label, factor = STATISTICS.get(statistic, (statistic, 1))
    modules = list(dict.fromkeys(rows["module"]))
    values = factor * rows.pivot_table(index="module", columns="step", values=statistic, observed=True).loc[modules]
    vmin = None if statistic == "cosine" else 0
    cells = np.ma.masked_invalid(values.to_numpy())
    # rasterized: in a PDF, thousands of small rectangles show hairlines between them
    mesh = ax.pcolormesh(
        edges_of(values.columns), np.arange(len(modules) + 1) - 0.5, cells,
        cmap=COLOUR_MAP, vmin=vmin, vmax=vmax, rasterized=True,
    )  # fmt: skip
    ax.invert_yaxis()
    thinned_ticks(ax.yaxis, modules, ax.bbox.height)
    ax.set(xlabel="training step", ylabel="module")
    return colour_bar(ax, mesh, label)


def paired(chosen: pd.DataFrame, ax: Axes, x: str, y: str) -> Axes:
    """Accuracy of method `y` against method `x`, a point per target and seeds that both have, and the diagonal."""
    if lacking := _lacking(chosen, ["algorithm", *PAIR, "accuracy"], NO_CHOSEN):
        return nothing_to_show(ax, lacking)
    ours, theirs = (chosen.loc[chosen["algorithm"] == name, [*PAIR, "accuracy"]] for name in (y, x))
    pairs = theirs.merge(ours, on=PAIR, suffixes=("_x", "_y")).dropna()
    if pairs.empty:
        return nothing_to_show(ax, f"no pairs: {x} and {y} share no target with the same seeds")
    if pairs["dataset"].nunique() > 1:
        pairs["target"] = pairs["dataset"].astype(str) + " " + pairs["target"].astype(str)
    for number, (target, rows) in enumerate(_each(pairs, "target")):
        look = {name: value for name, value in series_look(number).items() if name != "linestyle"}
        ax.scatter(100 * rows["accuracy_x"], 100 * rows["accuracy_y"], s=18, label=str(target), **look)
    make_square(ax, 100 * pairs[["accuracy_x", "accuracy_y"]].to_numpy())
    ax.set(xlabel=wrapped(f"accuracy of {x}, %", 30), ylabel=wrapped(f"accuracy of {y}, %", 30))
    ax.set_title(fill(f"{y} {_score(pairs)}", 36))
    add_grid(ax)
    # a square leaves room beside it
    ax.legend(**legend_entries(ax) | {"title": "target"}, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return ax


def _lacking(frame: pd.DataFrame | None, columns: Sequence[str], empty: str) -> str:
    """Why nothing of `columns` can be shown, or ""."""
    if frame is None or not len(frame):
        return empty
    absent = [column for column in columns if column not in frame]
    if absent:
        return f"nothing to show: no column {listing(absent)}"
    unset = [column for column in columns if frame[column].isna().all()]
    if unset or frame[list(columns)].dropna().empty:
        return f"nothing to show: no run has a value of {listing(unset or columns)}"
    return ""


def _require_one(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """UserError where the frame mixes what one curve must not."""
    for column in columns:
        found = frame[column].unique() if column in frame else ()
        if len(found) > 1:
            raise UserError(f"this plot shows one {column}; found: {listing(found)}.\nGive it the rows of one.")


def _each(frame: pd.DataFrame, column: str) -> Iterator[tuple[Hashable, pd.DataFrame]]:
    """(value, its rows) in the order seen."""
    for value in dict.fromkeys(frame[column]):
        yield value, frame[frame[column] == value]


def _of_every_run(rows: pd.DataFrame, by: list[str], runs: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(the rows of groups that have all the `runs`, the others): a mean over some of the runs jumps where one stops."""
    whole = rows.groupby(by, observed=True)["run_id"].transform("nunique") == runs
    return rows[whole], rows[~whole]


def _spread(values: pd.Series, by: pd.Series | list[pd.Series]) -> pd.DataFrame:
    """mean, std and error by group; of a single value there is neither std nor error."""
    groups = values.groupby(by, observed=True)
    found = pd.DataFrame({"mean": groups.mean(), "std": groups.std(ddof=0), "n": groups.size()})
    found["std"] = found["std"].where(found["n"] > 1)
    return found.assign(error=found["std"] / found["n"] ** 0.5)


def _over_repetitions(rows: pd.DataFrame, by: list[str]) -> tuple[pd.DataFrame, int]:
    """mean, std and error in percent by `by`, and how many of them have no complete repetition."""
    cells = rows.groupby(["dataset", "target"], observed=True).ngroup()
    groups = rows.assign(cell=cells).groupby([*by, "trial_seed", "seed"], sort=False, observed=True)
    means = groups.agg(accuracy=("accuracy", "mean"), cells=("cell", "nunique")).reset_index()
    whole = means[means["cells"] == cells.nunique()]
    points = _spread(100 * whole["accuracy"], [whole[column] for column in by])
    order = pd.MultiIndex.from_frame(whole[by].drop_duplicates())
    return points.loc[order].reset_index(), len(means[by].drop_duplicates()) - len(points)


def _mark_selected(shown: pd.DataFrame, ax: Axes, chosen: Mapping[str, pd.DataFrame]) -> None:
    target = shown.loc[shown["is_target"], ["run_id", "step", "accuracy"]]
    for (name, picked), (marker, size) in zip(chosen.items(), cycle(SELECTED), strict=False):
        if _lacking(picked, ["run_id", "step"], NO_CHOSEN):
            continue
        points = picked[["run_id", "step"]].merge(target, on=["run_id", "step"])
        look = {"marker": marker, "s": size, "facecolors": "none", "edgecolors": "black", "linewidths": 0.9}
        if len(points):
            ax.scatter(points["step"], 100 * points["accuracy"], label=name, zorder=4, **look)


def _comparable(values: pd.Series) -> pd.Series:
    """Numbers where every value is one, text otherwise: what sorts."""
    numbers = pd.to_numeric(values, errors="coerce")
    return numbers if numbers.notna().all() else values.astype(str)


def _partitions(chosen: pd.DataFrame) -> pd.Series:
    """The column `partition`; where runs of the name `chunk` differ in n_parts, with the number: chunk(5)."""
    names = chosen["partition"]
    if "n_parts" not in chosen or chosen.loc[names == "chunk", "n_parts"].nunique() < 2:
        return names
    return names.where(names != "chunk", "chunk(" + chosen["n_parts"].map(shown_as) + ")")


def _by_fineness(names: Sequence[str], order: Sequence[str] | None) -> list[str]:
    """`order` first, or the known granularities with chunks by their number; then the others in the order seen."""

    def place(name: str) -> tuple[int, int]:
        if order is not None:
            return (list(order).index(name) if name in order else len(order)), 0
        chunks = re.fullmatch(r"chunk\D*(\d*)\D*", name)
        known = "chunk" if chunks else name.partition(" (")[0]
        rank = GRANULARITIES.index(known) if known in GRANULARITIES else len(GRANULARITIES)
        return rank, int(chunks[1] or CHUNKS) if chunks else 0

    return sorted(names, key=place)


def _score(pairs: pd.DataFrame) -> str:
    """`better in 7 of 12 pairs, 1 tie`."""
    gain = pairs["accuracy_y"] - pairs["accuracy_x"]
    ties = int((gain == 0).sum())
    tied = f", {ties} tie{'s' * (ties > 1)}" if ties else ""
    return f"better in {(gain > 0).sum()} of {len(pairs)} pair{'s' * (len(pairs) > 1)}{tied}"
