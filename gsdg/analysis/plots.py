"""Plot functions (frame, ax) -> ax. Each draws only on the axes it is given.

    with drawing.print_style():
        fig, axes = drawing.figure()
        accuracy_by_step(records, axes[0, 0])
        fig.savefig("sketch.pdf")

Accuracies and other shares are in percent. Standard deviations and errors have the population form, as in the tables.
If a frame has nothing to show, the axes show a message that says what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import cycle
from textwrap import fill

import numpy as np
import pandas as pd

from gsdg.analysis.read.labels import natural
from gsdg.analysis.statistics import PAIR
from gsdg.analysis.style import (
    Axes,
    add_colour_bar,
    add_grid,
    add_grid_and_legend,
    cell_edges,
    draw_line,
    hatch_empty,
    legend_arguments,
    make_square,
    series_style,
    set_rotated_ticks,
    set_thinned_ticks,
    show_message,
    tick_label,
    wrap,
    write_values,
)
from gsdg.metrics import ACCURACY, Metric
from gsdg.utils.errors import UserError, listing

# Marker and size for each selection; hollow and of different sizes, because several selections may choose one point.
SELECTED = [("s", 40), ("o", 40), ("D", 14), ("^", 34), ("v", 34), ("x", 14)]
COLOUR_MAP = "cividis"
STATISTICS = {  # column of the diagnostics: (axis label, factor from the column's unit to the label's)
    "conflict_rate": ("conflicting pairs, %", 100),
    "cosine": ("mean cosine", 1),
    "removed_norm_ratio": ("removed norm, %", 100),
}
GRANULARITIES = ["model", "module", "tensor", "chunk", "filter", "element"]  # coarse to fine
DEFAULT_CHUNKS = 10  # n_parts in conf/algorithm/partition/chunk.yaml
NO_CHOSEN = "no finished runs to choose from"
NO_DIAGNOSTICS = "no diagnostics: run with algorithm.diagnostics=true"
SIGNED_COLOUR_MAP = "PuOr"  # of values around 0


def accuracy_by_step(
    records: pd.DataFrame,
    ax: Axes,
    chosen: Mapping[str, pd.DataFrame] | None = None,
    *,
    target_part: str = "in",
    source_part: str = "out",
    metric: Metric = ACCURACY,
) -> Axes:
    """Training curves: one line per domain, the target's line thicker; mean over runs +- standard deviation.

    The mean is drawn at the steps that all runs have recorded. Other steps, for example after one run has stopped
    early, are drawn as one thin line per run.

    Args:
        records: rows of `Runs.records` of one method and one target.
        chosen: {selection: selected runs}; marks the chosen steps on the target's curve of each run.
        target_part: split of the target domain; "in" is what the tables report.
        source_part: split of the source domains; "out" is what training-domain validation uses.
        metric: what the records hold.
    """
    columns = ["run_id", "step", "domain", "is_target", "part", "value"]
    if missing := _missing(records, columns, "no records"):
        return show_message(ax, missing)
    _require_single(records, ["dataset", "algorithm", "target"])
    shown = records[records["part"] == np.where(records["is_target"], target_part, source_part)]
    if shown.empty:
        values = "accuracies" if metric is ACCURACY else metric.name
        return show_message(ax, f"no {values}: neither the target's {target_part} nor the sources' {source_part}")
    n_runs = records["run_id"].nunique()
    for number, (domain, rows) in enumerate(_groups_in_order(shown, "domain")):
        is_target = bool(rows["is_target"].any())
        label = f"{domain} ({f'target, {target_part}' if is_target else source_part} split)"
        style = {"linewidth": 2.2, "linestyle": "-", "zorder": 3} if is_target else {"linewidth": 1.0}
        in_all_runs, in_some_runs = _split_complete(rows, ["step"], n_runs)
        curve = _mean_and_spread(metric.scale * in_all_runs["value"], in_all_runs["step"])
        draw_line(ax, curve, curve["std"], number, label=label, **style)
        colour = series_style(number)["color"]
        for _, run in _groups_in_order(in_some_runs.sort_values("step"), "run_id"):
            marker = "." if len(run) == 1 else ""
            ax.plot(run["step"], metric.scale * run["value"], color=colour, linewidth=0.5, alpha=0.6, marker=marker)
    _mark_selected(shown, ax, chosen or {}, metric)
    ax.set(xlabel="training step", ylabel=metric.label)
    return add_grid_and_legend(ax)


def alpha_n_parts(chosen: pd.DataFrame, ax: Axes, *, metric: Metric = ACCURACY) -> Axes:
    """Heat map of the metric over (alpha, n_parts): the mean over targets of each target's mean over runs.

    A cell that lacks a target which another cell has is hatched and has no value, because means over different targets
    cannot be compared. A star marks cells with fewer runs than the cell with the most runs.

    Args:
        chosen: selected runs with columns alpha, n_parts, target, value.
        metric: what the values are.
    """
    columns = ["alpha", "n_parts", "target", "value"]
    if missing := _missing(chosen, columns, NO_CHOSEN):
        return show_message(ax, missing)
    rows = (
        chosen[columns]
        .dropna()
        .assign(alpha=lambda r: _sortable(r["alpha"]), n_parts=lambda r: _sortable(r["n_parts"]))
    )
    by_target = rows.groupby(["alpha", "n_parts", "target"])["value"].mean().unstack()
    if (complete := by_target.dropna()).empty:
        return show_message(ax, f"no cell has all the targets: {listing(by_target.columns)}")
    means = (metric.scale * by_target.mean(axis=1, skipna=False)).unstack()
    n_runs = rows.groupby(["alpha", "n_parts"]).size().unstack().where(means.notna())
    image = ax.imshow(np.ma.masked_invalid(means), cmap=COLOUR_MAP, aspect="auto", interpolation="nearest")
    fewer = (n_runs < n_runs.max().max()).to_numpy()
    write_values(ax, image, means.to_numpy(), fewer, metric.decimals)
    hatch_empty(ax, means.isna().to_numpy())
    set_thinned_ticks(ax.xaxis, means.columns, 0.8 * ax.bbox.width)  # the colour bar takes the rest of the width
    set_thinned_ticks(ax.yaxis, means.index, ax.bbox.height)
    notes = ["* fewer runs"] * bool(fewer.any()) + ["hatched: lacks a target"] * (len(complete) < len(by_target))
    ax.set(xlabel=f"n_parts ({', '.join(notes)})" if notes else "n_parts", ylabel="alpha")
    return add_colour_bar(ax, image, metric.label)


def granularity(
    chosen: pd.DataFrame, ax: Axes, order: Sequence[str] | None = None, *, metric: Metric = ACCURACY
) -> Axes:
    """The metric over the partition, one line per rule: mean +- standard error over repetitions (trial seed, seed).

    A repetition's value is its mean over targets. Repetitions that lack a target are left out.

    Args:
        chosen: selected runs with columns rule, partition, the columns PAIR, value, and optionally n_parts.
        order: names of partitions, from left to right; None: from coarse to fine.
        metric: what the values are.
    """
    columns = ["rule", "partition", *PAIR, "value"]
    if missing := _missing(chosen, columns, NO_CHOSEN):
        return show_message(ax, missing)
    rows = chosen.assign(partition=_partitions(chosen)).dropna(subset=columns)
    points, left_out = _over_repetitions(rows, ["rule", "partition"], metric)
    if points.empty:
        return show_message(ax, f"no repetition has all the targets: {listing(rows['target'].unique())}")
    names = _coarse_to_fine(points["partition"].unique(), order)
    rules = list(dict.fromkeys(points["rule"]))
    for number, rule in enumerate(rules):
        offset = (number - (len(rules) - 1) / 2) * min(0.12, 0.7 / len(rules))  # so that error bars do not overlap
        line = points[points["rule"] == rule].set_index("partition").reindex(names).reset_index()
        line.index = line.index + offset
        line = line[line["mean"].notna()]
        errors = line["error"] if line["error"].notna().any() else None
        ax.errorbar(line.index, line["mean"], yerr=errors, label=str(rule), capsize=1.5, **series_style(number))
    note = f"\n({left_out} left out: a target is missing)" if left_out else ""
    ax.set(xlabel=f"granularity, coarse to fine{note}", ylabel=metric.label, xlim=(-0.5, len(names) - 0.5))
    set_rotated_ticks(ax, names)
    return add_grid_and_legend(ax)


def by_progress(
    diagnostics: pd.DataFrame, ax: Axes, statistic: str = "conflict_rate", level: str = "chunk", bins: int = 10
) -> Axes:
    """A statistic of the diagnostics over training progress, one line per method: mean +- standard error over runs.

    Steps are put into bins of training progress; a run's value in a bin is the mean over modules and steps. Bins in
    which a run of the method has no value are left out.

    Args:
        diagnostics: the frame of `frames.diagnostics`.
        statistic: a column of it; its label and unit are in STATISTICS.
        level: granularity of the statistic.
        bins: number of bins between 0 and 100 % of the steps.
    """
    columns = ["run_id", "algorithm", "level", "step", "steps", statistic]
    if missing := _missing(diagnostics, columns, NO_DIAGNOSTICS):
        return show_message(ax, missing)
    rows = diagnostics[diagnostics["level"] == level].dropna(subset=columns)
    if rows.empty:
        return show_message(ax, f"no diagnostics at the granularity {level}")
    label, factor = STATISTICS.get(statistic, (statistic, 1))
    width = 100 / bins
    bin_number = (rows["step"] * bins // rows["steps"]).clip(upper=bins - 1)
    rows = rows.assign(progress=(bin_number + 0.5) * width, value=factor * rows[statistic])
    # Methods are sorted by name. The order of the runs would change a method's colour when runs are added.
    for number, algorithm in enumerate(sorted(rows["algorithm"].unique(), key=natural)):
        of_method = rows[rows["algorithm"] == algorithm]
        by_step = of_method.groupby(["run_id", "progress", "step"], observed=True)["value"].mean()
        by_bin = by_step.groupby(["run_id", "progress"], observed=True).mean().reset_index()
        in_all_runs, _ = _split_complete(by_bin, ["progress"], of_method["run_id"].nunique())
        curve = _mean_and_spread(in_all_runs["value"], in_all_runs["progress"])
        draw_line(ax, curve, curve["error"], number, label=str(algorithm))
    ax.set(xlabel="training progress, %", ylabel=label, xlim=(0, 100))
    return add_grid_and_legend(ax)


def conflict_map(
    diagnostics: pd.DataFrame,
    ax: Axes,
    statistic: str = "conflict_rate",
    level: str = "chunk",
    vmax: float | None = None,
) -> Axes:
    """Heat map of a statistic over module and step, the mean over the runs of one method; the first module at the top.

    Only the steps that every run has logged are shown.

    Args:
        diagnostics: the rows of one method in the frame of `frames.diagnostics`.
        statistic: a column of it; its label and unit are in STATISTICS.
        level: granularity of the statistic.
        vmax: the upper end of the colour bar, in its unit; equal ends make several maps comparable.
    """
    columns = ["run_id", "level", "module", "step", statistic]
    if missing := _missing(diagnostics, columns, NO_DIAGNOSTICS):
        return show_message(ax, missing)
    _require_single(diagnostics, ["dataset", "algorithm"])
    rows = diagnostics[diagnostics["level"] == level].dropna(subset=columns)
    if rows.empty:
        return show_message(ax, f"no diagnostics at the granularity {level}")
    rows, _ = _split_complete(rows, ["step"], rows["run_id"].nunique())
    if rows.empty:
        return show_message(ax, "no step that every run has logged")
    label, factor = STATISTICS.get(statistic, (statistic, 1))
    modules = list(dict.fromkeys(rows["module"]))
    values = factor * rows.pivot_table(index="module", columns="step", values=statistic, observed=True).loc[modules]
    vmin = None if statistic == "cosine" else 0
    cells = np.ma.masked_invalid(values.to_numpy())
    # rasterized: as vector graphics, thousands of small rectangles have thin gaps between them in a PDF viewer
    mesh = ax.pcolormesh(
        cell_edges(values.columns), np.arange(len(modules) + 1) - 0.5, cells,
        cmap=COLOUR_MAP, vmin=vmin, vmax=vmax, rasterized=True,
    )  # fmt: skip
    ax.invert_yaxis()
    set_thinned_ticks(ax.yaxis, modules, ax.bbox.height)
    ax.set(xlabel="training step", ylabel="module")
    return add_colour_bar(ax, mesh, label)


def conflict_matrix(cosines: pd.DataFrame, ax: Axes) -> Axes:
    """Heat map of the mean cosine of each pair of domains: the mean over the steps of a run, then over runs.

    Neighbouring domains have similar gradients: they are in the order of a hierarchical clustering (average linkage)
    of the distances 1 - cosine; a pair that no run has seen together counts as the mean distance. The cells of such
    pairs, and the diagonal, stay blank: grey, because white is the cosine 0.

    Args:
        cosines: rows of one data set and method in the frame of `frames.domain_cosines`.
    """
    columns = ["run_id", "step", "domain_a", "domain_b", "cosine"]
    if missing := _missing(cosines, columns, NO_DIAGNOSTICS):
        return show_message(ax, missing)
    _require_single(cosines, ["dataset", "algorithm"])
    matrix, how = _clustered(_mean_cosines(cosines.dropna(subset=columns)))
    limit = np.nanmax(np.abs(matrix.to_numpy())) or 1.0
    edges = np.arange(len(matrix) + 1) - 0.5
    mesh = ax.pcolormesh(
        edges, edges, np.ma.masked_invalid(matrix.to_numpy()),
        cmap=SIGNED_COLOUR_MAP, vmin=-limit, vmax=limit, rasterized=True,
    )  # fmt: skip
    ax.set_facecolor("0.8")
    ax.invert_yaxis()
    set_thinned_ticks(ax.yaxis, list(matrix.index), ax.bbox.height)
    ax.set_xticks(ax.get_yticks(), [""] * len(ax.get_yticks()))
    ax.set(xlabel=f"the same domains, {how}", ylabel="domain")
    return add_colour_bar(ax, mesh, "mean cosine")


def paired(chosen: pd.DataFrame, ax: Axes, x: str, y: str, *, metric: Metric = ACCURACY) -> Axes:
    """Scatter plot of the metric of method `y` over that of method `x`, with the diagonal.

    One point per target, trial seed and seed of which both methods have a run.

    Args:
        chosen: selected runs with columns algorithm, the columns PAIR, value.
        metric: what the values are.
    """
    if missing := _missing(chosen, ["algorithm", *PAIR, "value"], NO_CHOSEN):
        return show_message(ax, missing)
    of_x, of_y = (chosen.loc[chosen["algorithm"] == name, [*PAIR, "value"]] for name in (x, y))
    pairs = of_x.merge(of_y, on=PAIR, suffixes=("_x", "_y")).dropna()
    if pairs.empty:
        return show_message(ax, f"no pairs: {x} and {y} share no target with the same seeds")
    if pairs["dataset"].nunique() > 1:
        pairs["target"] = pairs["dataset"].astype(str) + " " + pairs["target"].astype(str)
    for number, (target, rows) in enumerate(_groups_in_order(pairs, "target")):
        style = {name: value for name, value in series_style(number).items() if name != "linestyle"}
        ax.scatter(metric.scale * rows["value_x"], metric.scale * rows["value_y"], s=18, label=str(target), **style)
    make_square(ax, metric.scale * pairs[["value_x", "value_y"]].to_numpy())
    unit = ", %" if metric.percent else ""
    ax.set(xlabel=wrap(f"{metric.name} of {x}{unit}", 30), ylabel=wrap(f"{metric.name} of {y}{unit}", 30))
    ax.set_title(fill(f"{y} {_score(pairs, metric)}", 36))
    add_grid(ax)
    # The legend fits beside the square, which does not use the whole width.
    ax.legend(**legend_arguments(ax) | {"title": "target"}, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return ax


def _missing(frame: pd.DataFrame | None, columns: Sequence[str], empty: str) -> str:
    """A message why a plot of `columns` has nothing to show, or "". `empty`: the message for a frame without rows."""
    if frame is None or not len(frame):
        return empty
    absent = [column for column in columns if column not in frame]
    if absent:
        return f"nothing to show: no column {listing(absent)}"
    unset = [column for column in columns if frame[column].isna().all()]
    if unset or frame[list(columns)].dropna().empty:
        return f"nothing to show: no run has a value of {listing(unset or columns)}"
    return ""


def _require_single(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """UserError if one of the columns has several values: one curve must not mix them."""
    for column in columns:
        values = frame[column].unique() if column in frame else ()
        if len(values) > 1:
            raise UserError(f"this plot shows one {column}; found: {listing(values)}.\nGive it the rows of one.")


def _groups_in_order(frame: pd.DataFrame, column: str) -> Iterator[tuple[Hashable, pd.DataFrame]]:
    """(value of the column, its rows), in the order of first appearance."""
    for value in dict.fromkeys(frame[column]):
        yield value, frame[frame[column] == value]


def _split_complete(rows: pd.DataFrame, by: list[str], n_runs: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows of the groups in which all `n_runs` runs occur, the other rows).

    A mean over the runs that happen to be there would jump at the step where one of them stops.
    """
    is_complete = rows.groupby(by, observed=True)["run_id"].transform("nunique") == n_runs
    return rows[is_complete], rows[~is_complete]


def _mean_cosines(cosines: pd.DataFrame) -> pd.DataFrame:
    """The symmetric matrix of the mean cosines, domains in order of appearance; NaN for pairs without a value."""
    domains = list(dict.fromkeys(np.ravel(cosines[["domain_a", "domain_b"]].to_numpy())))
    swapped = cosines.rename(columns={"domain_a": "domain_b", "domain_b": "domain_a"})
    pairs = pd.concat([cosines, swapped], ignore_index=True)
    of_run = pairs.groupby(["domain_a", "domain_b", "run_id"], observed=True)["cosine"].mean()
    mean = of_run.groupby(["domain_a", "domain_b"], observed=True).mean()
    return mean.unstack().reindex(index=domains, columns=domains)


def _clustered(matrix: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The matrix of cosines in the order of a clustering, and what that order is, as text.

    Without scipy, and for two domains, in the order that it has.
    """
    if len(matrix) < 3:
        return matrix, "in the data set's order"
    try:
        from scipy.cluster import hierarchy
        from scipy.spatial.distance import squareform
    except ImportError:
        return matrix, "in the data set's order (clustered with scipy: pip install 'gsdg[statistics]')"
    distances = 1 - matrix.to_numpy(dtype=float)
    np.fill_diagonal(distances, np.nan)
    distances = np.where(np.isnan(distances), np.nanmean(distances), distances)
    np.fill_diagonal(distances, 0)
    tree = hierarchy.linkage(squareform(distances, checks=False), "average", optimal_ordering=True)
    order = hierarchy.leaves_list(tree)
    return matrix.iloc[order, order], "similar ones together"


def _mean_and_spread(values: pd.Series, by: pd.Series | list[pd.Series]) -> pd.DataFrame:
    """Columns mean, std, n and error of each group; std and error are NaN for a single value."""
    groups = values.groupby(by, observed=True)
    frame = pd.DataFrame({"mean": groups.mean(), "std": groups.std(ddof=0), "n": groups.size()})
    frame["std"] = frame["std"].where(frame["n"] > 1)
    return frame.assign(error=frame["std"] / frame["n"] ** 0.5)


def _over_repetitions(rows: pd.DataFrame, by: list[str], metric: Metric) -> tuple[pd.DataFrame, int]:
    """(scaled mean, std and error over the complete repetitions of each group, number of groups without one)."""
    cells = rows.groupby(["dataset", "target"], observed=True).ngroup()
    groups = rows.assign(cell=cells).groupby([*by, "trial_seed", "seed"], sort=False, observed=True)
    means = groups.agg(value=("value", "mean"), cells=("cell", "nunique")).reset_index()
    complete = means[means["cells"] == cells.nunique()]
    points = _mean_and_spread(metric.scale * complete["value"], [complete[column] for column in by])
    order = pd.MultiIndex.from_frame(complete[by].drop_duplicates())
    return points.loc[order].reset_index(), len(means[by].drop_duplicates()) - len(points)


def _mark_selected(shown: pd.DataFrame, ax: Axes, chosen: Mapping[str, pd.DataFrame], metric: Metric) -> None:
    """Mark the selected steps on the target's curves, one kind of marker per selection."""
    target = shown.loc[shown["is_target"], ["run_id", "step", "value"]]
    for (name, rows), (marker, size) in zip(chosen.items(), cycle(SELECTED), strict=False):
        if _missing(rows, ["run_id", "step"], NO_CHOSEN):
            continue
        points = rows[["run_id", "step"]].merge(target, on=["run_id", "step"])
        if len(points):
            ax.scatter(
                points["step"], metric.scale * points["value"], label=name, marker=marker, s=size,
                facecolors="none", edgecolors="black", linewidths=0.9, zorder=4,
            )  # fmt: skip


def _sortable(values: pd.Series) -> pd.Series:
    """Numbers if every value is one, else text: mixed values cannot be sorted."""
    numbers = pd.to_numeric(values, errors="coerce")
    return numbers if numbers.notna().all() else values.astype(str)


def _partitions(chosen: pd.DataFrame) -> pd.Series:
    """The column `partition`; if the runs of partition `chunk` differ in n_parts, with the number: chunk(5)."""
    names = chosen["partition"]
    if "n_parts" not in chosen or chosen.loc[names == "chunk", "n_parts"].nunique() < 2:
        return names
    return names.where(names != "chunk", "chunk(" + chosen["n_parts"].map(tick_label) + ")")


def _coarse_to_fine(names: Sequence[str], order: Sequence[str] | None) -> list[str]:
    """The names in `order`, or by GRANULARITIES and chunks by their number; others last, in their given order."""

    def position(name: str) -> tuple[int, int]:
        if order is not None:
            return (list(order).index(name) if name in order else len(order)), 0
        chunks = re.fullmatch(r"chunk\D*(\d*)\D*", name)
        granularity = "chunk" if chunks else name.partition(" (")[0]
        rank = GRANULARITIES.index(granularity) if granularity in GRANULARITIES else len(GRANULARITIES)
        return rank, int(chunks[1] or DEFAULT_CHUNKS) if chunks else 0

    return sorted(names, key=position)


def _score(pairs: pd.DataFrame, metric: Metric) -> str:
    """`better in 7 of 12 pairs, 1 tie`."""
    difference = pairs["value_y"] - pairs["value_x"]
    gain = -difference if metric.lower_is_better else difference
    ties = int((gain == 0).sum())
    tied = f", {ties} tie{'s' * (ties > 1)}" if ties else ""
    return f"better in {(gain > 0).sum()} of {len(pairs)} pair{'s' * (len(pairs) > 1)}{tied}"
