"""Plot functions (frame, ax) -> ax of the predictions for single images, see `gsdg.metrics.predictions`.

As in `plots`, each draws only on the axes it is given, and shows a message if there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gsdg.analysis.style import (
    Axes,
    add_colour_bar,
    add_grid,
    add_grid_and_legend,
    hatch_empty,
    series_style,
    set_rotated_ticks,
    set_thinned_ticks,
    show_message,
    write_values,
)
from gsdg.metrics.definitions import calibration, confusion_matrix
from gsdg.metrics.predictions import classes_of, outcomes_of

COLOUR_MAP = "cividis"
MOST_LABELLED = 10  # classes for which there is room on the x axis
MOST_GROUPS = 12  # colours of points that can be told apart
NO_PREDICTIONS = "no predictions"
BARS = 0.3  # height of the bars of the reliability diagram, as a share of the axes


def confusion(predictions: pd.DataFrame, ax: Axes) -> Axes:
    """Confusion matrix: in each row the images of one class, in % of them by predicted class.

    A class without images has a hatched row.
    """
    if predictions.empty:
        return show_message(ax, NO_PREDICTIONS)
    classes, outcomes = classes_of(predictions), outcomes_of(predictions)
    counts = confusion_matrix(outcomes.labels, outcomes.predictions, len(classes))
    images = counts.sum(axis=1, keepdims=True)
    shares = np.divide(100 * counts, images, out=np.full(counts.shape, np.nan), where=images > 0)
    cells = np.ma.masked_invalid(shares)
    image = ax.imshow(cells, cmap=COLOUR_MAP, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    written = np.where(counts > 0, shares, np.nan)  # zeros would distract from the errors
    write_values(ax, image, written, np.zeros(shares.shape, bool), decimals=0)
    hatch_empty(ax, np.isnan(shares))
    set_thinned_ticks(ax.yaxis, classes, ax.bbox.height)
    if len(classes) <= MOST_LABELLED:
        set_rotated_ticks(ax, classes)
    else:
        ax.set_xticks([])
    in_order = "" if len(classes) <= MOST_LABELLED else "\n(in the same order)"
    ax.set(xlabel=f"predicted class{in_order}", ylabel="true class")
    return add_colour_bar(ax, image, "% of the true class")


def reliability(predictions: pd.DataFrame, ax: Axes) -> Axes:
    """Reliability diagram (Guo et al., ICML 2017): accuracy over confidence, both in %, one point per bin with images.

    The vertical lines are the gaps to perfect calibration, the diagonal; their mean, weighted by the numbers of images,
    is the expected calibration error in the title. Bars at the bottom: the number of images per bin, axis at the right.
    """
    if predictions.empty:
        return show_message(ax, NO_PREDICTIONS)
    bins = calibration(outcomes_of(predictions))
    width = 100 / len(bins.images)
    centres = (np.arange(len(bins.images)) + 0.5) * width
    counts = ax.twinx()
    counts.bar(centres, bins.images, 0.9 * width, color="0.85")
    counts.set(ylim=(0, bins.images.max() / BARS), ylabel="images (bars)")
    counts.set_yticks([0, bins.images.max()])
    ax.set_zorder(counts.get_zorder() + 1)  # the points in front of the bars
    ax.patch.set_visible(False)

    filled = bins.images > 0
    confidence, accuracy = 100 * bins.confidence[filled], 100 * bins.accuracy[filled]
    style = series_style(0)
    ax.plot([0, 100], [0, 100], color="0.5", linewidth=0.8)
    ax.vlines(confidence, confidence, accuracy, color=style["color"], linewidth=0.8)
    ax.plot(confidence, accuracy, **style, clip_on=False)
    ax.set(xlim=(0, 100), ylim=(0, 100), xlabel="confidence, %", ylabel="accuracy, %")
    ax.set_title(f"ECE {100 * bins.error:.1f} %, {bins.images.sum():,} images")
    add_grid(ax)
    return ax


def feature_map(points: np.ndarray, names: Sequence[str], ax: Axes, what: str = "component") -> Axes:
    """Scatter plot of N images in two dimensions, with a colour and a marker per name.

    Of more than MOST_GROUPS names, those with the fewest images are grey.

    Args:
        points: [N, 2].
        names: N names, for example of the images' classes; the legend has the order of a pandas Categorical.
        what: what the axes are, for their labels.
    """
    if not len(points):
        return show_message(ax, "no images")
    column = pd.Categorical(names).remove_unused_categories()
    largest = column.value_counts().sort_values(ascending=False, kind="stable").index[:MOST_GROUPS]
    rest = ~column.isin(largest.to_numpy())
    if rest.any():
        label = f"{len(column.categories) - MOST_GROUPS} others"
        ax.scatter(*points[rest].T, s=3, color="0.8", linewidths=0, label=label)
    for number, name in enumerate(name for name in column.categories if name in largest):
        style = series_style(number)
        ax.scatter(
            *points[column == name].T, s=6, color=style["color"], marker=style["marker"], linewidths=0, label=name
        )
    ax.set(xlabel=f"{what} 1", ylabel=f"{what} 2", xticks=[], yticks=[])
    return add_grid_and_legend(ax)
