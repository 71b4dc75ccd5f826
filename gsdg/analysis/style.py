"""Style and helpers of the plots: settings for print, colours, ticks that do not overlap, legends that fit.

Designed for axes of about 3.4 x 2.6 inches with text of 8 points, in a figure with layout="constrained". Lines differ
in colour (the palette of Okabe and Ito), marker and line style.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from textwrap import fill
from typing import Any, Literal

import numpy as np
import pandas as pd

from gsdg.utils.errors import UserError

try:
    import matplotlib
except ImportError:
    raise UserError(
        "plots need matplotlib: pip install 'gsdg[plots]' (in a checkout: pip install -e '.[plots]')"
    ) from None

from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation, Transform

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # without the pale yellow
MARKERS = "osD^vPX<>ph"
LINES = ["-", "--", "-.", ":"]
LEGEND = {"frameon": False, "borderpad": 0, "borderaxespad": 0.4, "labelspacing": 0.25, "columnspacing": 1.2}


def print_style() -> AbstractContextManager[None]:
    """A context with matplotlib settings for print. Make, draw and save a figure inside of it."""
    return matplotlib.rc_context(
        {
            "font.size": 8,
            "axes.titlesize": 8,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "axes.linewidth": 0.6,
            "lines.linewidth": 1.2,
            "lines.markersize": 4,
            "savefig.dpi": 300,
            "pdf.fonttype": 42,  # TrueType, because publishers refuse Type 3 fonts
            "ps.fonttype": 42,
            "text.parse_math": False,  # a $ in a name is not the beginning of a formula
        }
    )


def figure(columns: int = 1, rows: int = 1, *, scale: float = 1) -> tuple[Figure, np.ndarray]:
    """A figure and its axes [rows, columns], 3.4 x 2.6 inches each, times scale.

    It is not made by pyplot, so it needs no display and need not be closed.
    """
    fig = Figure(figsize=(3.4 * scale * columns, 2.6 * scale * rows), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)


def show_message(ax: Axes, message: str) -> Axes:
    """Show a message in place of a plot."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, fill(message, 32), ha="center", va="center", transform=ax.transAxes)
    return ax


def series_style(number: int) -> dict:
    """Colour, marker and line style of the line with this number; all three repeat only after hundreds of lines."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number % len(LINES)],
    }


def draw_line(ax: Axes, curve: pd.DataFrame, spread: pd.Series, number: int, **kwargs) -> None:
    """Draw the column `mean` over the index, with at most ten markers, and a band of mean +- spread.

    Args:
        curve: a frame with the column `mean`.
        spread: half the height of the band; NaN: no band.
        number: which line of the axes it is, see `series_style`.
    """
    ax.plot(curve.index, curve["mean"], markevery=math.ceil(len(curve) / 10) or 1, **series_style(number) | kwargs)
    if spread.notna().any():
        low, high = curve["mean"] - spread, curve["mean"] + spread
        ax.fill_between(curve.index, low, high, color=series_style(number)["color"], alpha=0.18, linewidth=0)


def tick_label(value: object) -> str:
    """A value as the label of a tick: 10 for 10.0; a long name is shortened to its start and end."""
    text = f"{value:g}" if isinstance(value, int | float | np.number) else str(value)
    return text if len(text) <= 18 else f"{text[:12]}…{text[-5:]}"


def cell_edges(steps: Sequence[int]) -> np.ndarray:
    """The edges [n + 1] of heat map cells around the n steps: half way between neighbouring steps."""
    centres = np.asarray(steps, float)
    middles = (centres[1:] + centres[:-1]) / 2
    first, last = (middles[0], middles[-1]) if len(middles) else (centres[0] + 0.5, centres[0] - 0.5)
    return np.concatenate([[2 * centres[0] - first], middles, [2 * centres[-1] - last]])


def set_thinned_ticks(axis: XAxis | YAxis, values: Sequence[object], length: float) -> None:
    """A tick for every k-th value, with the smallest k so that the labels fit into `length` pixels."""
    labels, size = [tick_label(value) for value in values], font_size("ytick.labelsize")
    per_label = 1.3 * size if axis.axis_name == "y" else (max(map(len, labels)) + 1) * 0.65 * size  # points
    every = math.ceil(len(labels) * per_label / (length * 72 / axis.axes.figure.dpi))
    axis.set_ticks(range(0, len(labels), every), labels[::every])


def set_rotated_ticks(ax: Axes, names: Sequence[str]) -> None:
    """A tick for each name on the x axis; labels are rotated by 45 or 90 degrees if they would overlap otherwise."""
    labels, size = [tick_label(name) for name in names], font_size("xtick.labelsize")
    available = ax.bbox.width * 72 / ax.figure.dpi / len(labels)  # points per label
    fits = max(map(len, labels)) * 0.65 * size < available
    angle = 0 if fits else 45 if available > 2 * size else 90
    anchor: dict[str, Any] = {}
    if angle:
        anchor = {"ha": "right", "va": "top" if angle == 45 else "center", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(labels)), labels, rotation=angle, **anchor)


def font_size(setting: Literal["font.size", "xtick.labelsize", "ytick.labelsize"]) -> float:
    """The current font size of a matplotlib setting such as "font.size", in points."""
    return FontProperties(size=matplotlib.rcParams[setting]).get_size_in_points()


def write_values(ax: Axes, image: ScalarMappable, values: np.ndarray, starred: np.ndarray, decimals: int = 1) -> None:
    """Write each value into its heat map cell, unless the cells are too small for readable text.

    Args:
        values: [rows, columns]; cells that are not finite stay empty.
        starred: [rows, columns] of bool; a star is appended to these values.
        decimals: of the text.
    """
    height, width = (pixels * 72 / ax.figure.dpi for pixels in (ax.bbox.height, 0.8 * ax.bbox.width))
    size = min(font_size("font.size"), width / values.shape[1] / 3.4, 0.75 * height / values.shape[0])
    if size < 4.5:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{value:.{decimals}f}" + "*" * bool(starred[row, column])
            colour = text_colour_on(image.cmap(image.norm(value)))
            ax.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def text_colour_on(background: Sequence[float] | np.ndarray) -> str:
    """Black or white, whichever has more contrast to `background`, [red, green, blue, ...] in [0, 1].

    Source: WCAG's relative luminance.
    """
    rgb = np.asarray(background[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ [0.2126, 0.7152, 0.0722] > 0.179 else "white"


def hatch_empty(ax: Axes, empty: np.ndarray) -> None:
    """Hatch the heat map cells for which `empty` [rows, columns] is true."""
    for row, column in np.argwhere(empty):
        cell = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor="0.6", linewidth=0)
        ax.add_patch(cell)


def add_colour_bar(ax: Axes, image: ScalarMappable, label: str) -> Axes:
    """A colour bar beside the axes; if they are too narrow, the x label names the quantity that the colour shows."""
    if ax.bbox.width / ax.figure.dpi < 1.8:
        ax.set_xlabel(f"{ax.get_xlabel()}\n(colour: {label})")
    else:
        ax.figure.colorbar(image, ax=ax, label=label)
    return ax


def make_square(ax: Axes, values: np.ndarray) -> None:
    """Give both axes the same limits and scale, from all `values`, and draw the diagonal."""
    margin = 0.06 * (values.max() - values.min()) or 1
    limits = (values.min() - margin, values.max() + margin)
    ax.plot(limits, limits, color="0.5", linewidth=0.8, zorder=0)
    ax.set(xlim=limits, ylim=limits)
    ax.set_aspect("equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def add_grid(ax: Axes) -> None:
    ax.grid(color="0.9", linewidth=0.5)
    ax.set_axisbelow(True)


def add_grid_and_legend(ax: Axes) -> Axes:
    """Add the grid, and a legend below the x label in as many columns as fit.

    Call it last: the legend's position depends on the ticks and labels.
    """
    add_grid(ax)
    arguments = legend_arguments(ax)
    position = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below_labels(ax)}
    for columns in range(len(arguments["labels"]), 0, -1):
        legend = ax.legend(**arguments, **position, ncols=columns)
        if legend.get_window_extent().width < ax.bbox.width:
            break
    # A tall legend makes the axes so low that the y label no longer fits on one line.
    if legend.get_window_extent().height > 0.4 * ax.bbox.height:
        ax.set_ylabel(wrap(ax.get_ylabel(), 14))
    return ax


def legend_arguments(ax: Axes) -> dict:
    """Arguments for `ax.legend`: handles, labels without the name they share, which is the title, and text sizes."""
    handles, labels = ax.get_legend_handles_labels()
    title, labels = split_shared_name(labels)
    size = "small" if len(labels) <= 8 else "x-small"
    entries = {"handles": handles, "labels": [fill(label, 44) for label in labels], "title": title}
    return {**entries, "fontsize": size, "title_fontsize": size, **LEGEND}


def below_labels(ax: Axes) -> Transform:
    """Axes coordinates shifted down by the height of the x axis's labels, also after the axes are resized."""
    labels = ax.xaxis.get_tightbbox()  # None if the axis is not visible
    depth = 0 if labels is None else (ax.bbox.y0 - labels.y0) / ax.figure.dpi
    return ax.transAxes + ScaledTranslation(0, -depth, ax.figure.dpi_scale_trans)


def wrap(text: str, width: int) -> str:
    """Break the text into lines of at most `width` characters, but not before a unit such as `, %`."""
    return fill(text.replace(", %", ",\xa0%"), width).replace("\xa0", " ")


def split_shared_name(labels: list[str]) -> tuple[str | None, list[str]]:
    """("pcgrad", ["n=1", "n=5"]) for "pcgrad (n=1)" and "pcgrad (n=5)"; (None, labels) if the names differ."""
    parts = [part for label in labels if (part := re.fullmatch(r"(.+?) \((.+)\)", label))]
    if len(labels) < 2 or len(parts) < len(labels) or len({part[1] for part in parts}) > 1:
        return None, labels
    return parts[0][1], [part[2] for part in parts]
