"""How plots look and what they share: settings for print, colours, ticks that do not collide, legends that fit.

Series differ in colour (Okabe and Ito's), marker and line. Made for axes of about 3.4 x 2.6 inches at 8 points in a
figure with layout="constrained".
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from textwrap import fill

import numpy as np
import pandas as pd

from gsdg.errors import UserError

try:
    import matplotlib
except ImportError:
    raise UserError(
        "plots need matplotlib: pip install 'gsdg[plots]' (in a checkout: pip install -e '.[plots]')"
    ) from None

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation, Transform

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # without yellow: too pale
MARKERS = "osD^vPX<>ph"
LINES = ["-", "--", "-.", ":"]
LEGEND = {"frameon": False, "borderpad": 0, "borderaxespad": 0.4, "labelspacing": 0.25, "columnspacing": 1.2}


def style() -> AbstractContextManager[None]:
    """A context with settings for print; save the figure inside it too."""
    sizes = {"font.size": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7}
    sizes |= {"axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 4}
    files = {"savefig.dpi": 300, "pdf.fonttype": 42, "ps.fonttype": 42}  # 42: publishers refuse Type 3 fonts
    files["text.parse_math"] = False  # a $ in a name begins no formula
    return matplotlib.rc_context({**sizes, **files})


def figure(columns: int = 1, rows: int = 1) -> tuple[Figure, np.ndarray]:
    """A figure and its axes [rows, columns], 3.4 x 2.6 inches each. Not pyplot's: it needs no display, no closing."""
    fig = Figure(figsize=(3.4 * columns, 2.6 * rows), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)


def nothing_to_show(ax: Axes, why: str) -> Axes:
    """Empty axes that say why."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, fill(why, 32), ha="center", va="center", transform=ax.transAxes)
    return ax


def series_look(number: int) -> dict:
    """Colour, marker and line of a series: together they repeat only after hundreds."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number % len(LINES)],
    }


def draw_line(ax: Axes, curve: pd.DataFrame, spread: pd.Series, number: int, **kwargs) -> None:
    """The means over the index, a few markers on them, a band where there is a spread."""
    ax.plot(curve.index, curve["mean"], markevery=math.ceil(len(curve) / 10) or 1, **series_look(number) | kwargs)
    if spread.notna().any():
        low, high = curve["mean"] - spread, curve["mean"] + spread
        ax.fill_between(curve.index, low, high, color=series_look(number)["color"], alpha=0.18, linewidth=0)


def shown_as(value: object) -> str:
    """As a tick's label: 10 for 10.0; of a long name the start and the end."""
    text = f"{value:g}" if isinstance(value, int | float | np.number) else str(value)
    return text if len(text) <= 18 else f"{text[:12]}…{text[-5:]}"


def edges_of(steps: Sequence[int]) -> np.ndarray:
    """[n + 1] half way between the steps."""
    steps = np.asarray(steps, float)
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = (middles[0], middles[-1]) if len(middles) else (steps[0] + 0.5, steps[0] - 0.5)
    return np.concatenate([[2 * steps[0] - first], middles, [2 * steps[-1] - last]])


def thinned_ticks(axis: Axis, values: Sequence[object], room: float) -> None:
    """A tick a value, or at every k-th of them: as many as fit in `room` pixels."""
    labels, size = [shown_as(value) for value in values], points_of("ytick.labelsize")
    one = 1.3 * size if axis.axis_name == "y" else (max(map(len, labels)) + 1) * 0.65 * size
    every = math.ceil(len(labels) * one / (room * 72 / axis.axes.figure.dpi))
    axis.set_ticks(range(0, len(labels), every), labels[::every])


def turned_ticks(ax: Axes, names: Sequence[str]) -> None:
    """A tick a name below the axes, turned as far as the room asks for."""
    labels, size = [shown_as(name) for name in names], points_of("xtick.labelsize")
    one = ax.bbox.width * 72 / ax.figure.dpi / len(labels)
    flat = max(map(len, labels)) * 0.65 * size < one
    angle = 0 if flat else 45 if one > 2 * size else 90
    turned = {"ha": "right", "va": "top" if angle == 45 else "center", "rotation_mode": "anchor"} if angle else {}
    ax.set_xticks(range(len(labels)), labels, rotation=angle, **turned)


def points_of(setting: str) -> float:
    """A font size of the settings in force, in points."""
    return FontProperties(size=matplotlib.rcParams[setting]).get_size_in_points()


def write_values(ax: Axes, image: ScalarMappable, values: np.ndarray, starred: np.ndarray) -> None:
    """Each value in its cell, unless the cells are too small for it."""
    height, width = (pixels * 72 / ax.figure.dpi for pixels in (ax.bbox.height, 0.8 * ax.bbox.width))
    size = min(points_of("font.size"), width / values.shape[1] / 3.4, 0.75 * height / values.shape[0])
    if size < 4.5:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{value:.1f}" + "*" * bool(starred[row, column])
            colour = ink_on(image.cmap(image.norm(value)))
            ax.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def ink_on(background: Sequence[float]) -> str:
    """Black or white, whichever contrasts more (WCAG's relative luminance)."""
    rgb = np.asarray(background[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ [0.2126, 0.7152, 0.0722] > 0.179 else "white"


def hatch_empty(ax: Axes, empty: np.ndarray) -> None:
    for row, column in np.argwhere(empty):
        cell = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor="0.6", linewidth=0)
        ax.add_patch(cell)


def colour_bar(ax: Axes, image: ScalarMappable, label: str) -> Axes:
    """A colour bar; beside axes too narrow for it, the x label says what the colour is."""
    if ax.bbox.width / ax.figure.dpi < 1.8:
        ax.set_xlabel(f"{ax.get_xlabel()}\n(colour: {label})")
    else:
        ax.figure.colorbar(image, ax=ax, label=label)
    return ax


def make_square(ax: Axes, values: np.ndarray) -> None:
    """The same limits and scale for both axes, and the diagonal."""
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


def finish(ax: Axes) -> Axes:
    """Grid, and the legend below the labels, in as many columns as fit. Last: it asks where the labels end."""
    add_grid(ax)
    entries = legend_entries(ax)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below_labels(ax)}
    for columns in range(len(entries["labels"]), 0, -1):
        legend = ax.legend(**entries, **place, ncols=columns)
        if legend.get_window_extent().width < ax.bbox.width:
            break
    if legend.get_window_extent().height > 0.4 * ax.bbox.height:
        ax.set_ylabel(wrapped(ax.get_ylabel(), 14))
    return ax


def legend_entries(ax: Axes) -> dict:
    """Arguments of `legend`: its series, smaller where they are many, and how tight it is set."""
    handles, labels = ax.get_legend_handles_labels()
    title, labels = shared_head(labels)
    size = "small" if len(labels) <= 8 else "x-small"
    entries = {"handles": handles, "labels": [fill(label, 44) for label in labels], "title": title}
    return {**entries, "fontsize": size, "title_fontsize": size, **LEGEND}


def below_labels(ax: Axes) -> Transform:
    """Axes coordinates, moved down by the height of the x axis's labels, whatever size the axes get."""
    depth = (ax.bbox.y0 - ax.xaxis.get_tightbbox().y0) / ax.figure.dpi
    return ax.transAxes + ScaledTranslation(0, -depth, ax.figure.dpi_scale_trans)


def wrapped(text: str, width: int) -> str:
    """Lines of at most `width` letters; a unit stays with its word."""
    return fill(text.replace(", %", ",\xa0%"), width).replace("\xa0", " ")


def shared_head(labels: list[str]) -> tuple[str | None, list[str]]:
    """("pcgrad", ["n=1", "n=5"]) of "pcgrad (n=1)" and "pcgrad (n=5)"; (None, labels) where the heads differ."""
    parts = [re.fullmatch(r"(.+?) \((.+)\)", label) for label in labels]
    if len(parts) < 2 or not all(parts) or len({part[1] for part in parts}) > 1:
        return None, labels
    return parts[0][1], [part[2] for part in parts]
