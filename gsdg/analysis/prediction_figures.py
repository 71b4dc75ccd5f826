"""The predictions for single images -> figures. `prediction_plots` draws the axes.

frame = read_predictions("predictions.parquet")
confusions(frame).save("confusion.pdf")
reliabilities(frame)                        # in a notebook: one picture
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from gsdg.analysis import prediction_plots, style
from gsdg.analysis.figures import Panels
from gsdg.analysis.style import Figure
from gsdg.metrics.predictions import by_part
from gsdg.utils.errors import check_literal, not_installed, plural

COLUMNS = 4  # images in a row of the gallery
TILE = (1.7, 2.1)  # inches of an image in the gallery, with its text
SMALL = 64  # pixels: images that are lower are enlarged without interpolation
MOST_POINTS = 2000  # in a map of features: t-SNE takes half a minute for them
Embedding = Literal["pca", "tsne"]


def confusions(predictions: pd.DataFrame) -> Panels:
    """Confusion matrices, one per domain and part."""
    panels = [(title, partial(prediction_plots.confusion, rows)) for title, rows in _titled(predictions)]
    return Panels(
        panels, "hatched: the part has no image of the class", "" if panels else prediction_plots.NO_PREDICTIONS
    )


def reliabilities(predictions: pd.DataFrame) -> Panels:
    """Reliability diagrams, one per domain and part."""
    panels = [(title, partial(prediction_plots.reliability, rows)) for title, rows in _titled(predictions)]
    note = "points: bins of equal width by confidence; diagonal: perfectly calibrated"
    return Panels(panels, note, "" if panels else prediction_plots.NO_PREDICTIONS)


def gallery(errors: pd.DataFrame, images: Sequence[ArrayLike]) -> Figure:
    """Wrongly classified images, each with its true and its predicted class, the probability, and its domain.

    Args:
        errors: rows of `gsdg.metrics.predictions.confident_errors`.
        images: the image of each row, [h, w, 3] uint8 or anything that numpy makes of it, such as a Pillow image.
    """
    rows = max(1, -(-len(errors) // COLUMNS))
    with style.print_style():
        figure = Figure(figsize=(TILE[0] * COLUMNS, TILE[1] * rows), layout="constrained")
        axes = figure.subplots(rows, COLUMNS, squeeze=False)
        for ax in axes.flat[len(errors) :]:
            ax.set_axis_off()
        for ax, image, row in zip(axes.flat, images, errors.to_dict("records"), strict=False):
            pixels = np.asarray(image)
            ax.imshow(pixels, interpolation="nearest" if len(pixels) < SMALL else "antialiased")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set(color="0.8")  # a frame, because sketches have a white background
            true, predicted, domain = (style.tick_label(row[name]) for name in ("label", "prediction", "domain"))
            ax.set_title(
                f"true {true}\npredicted {predicted}\n{100 * row['probability']:.1f} %, {domain}", fontsize=6.5
            )
        if errors.empty:
            style.show_message(axes[0, 0], "no errors")
    return figure


def feature_maps(
    features: np.ndarray, predictions: pd.DataFrame, how: Embedding = "pca", seed: int = 0, total: int | None = None
) -> Panels:
    """The features in two dimensions, once coloured by class and once by domain; needs scikit-learn.

    Of more than MOST_POINTS images, as many are drawn at random.

    Args:
        features: [N, F], see `gsdg.evaluation.predictions.features`.
        predictions: the N rows of the same images.
        how: pca (scikit-learn's PCA) or tsne (van der Maaten and Hinton, JMLR 2008; scikit-learn's, started from PCA).
        seed: of the drawn images and of t-SNE.
        total: the number of images that the N were drawn from; None: they are all.
    """
    check_literal("how", how, Embedding)
    rows = drawn(len(features), seed=seed)
    if len(rows) < 3:
        return Panels(why=f"a map of features needs 3 images or more, found {plural(len(rows), 'image')}")
    points, what = _embedded(features[rows], how, seed)
    shown = predictions.iloc[rows]
    draw = partial(prediction_plots.feature_map, points)
    panels = [
        (f"by {name}", partial(draw, shown[column], what=what))
        for name, column in {"class": "label", "domain": "domain"}.items()
    ]
    total = total or len(features)
    sample = f", {len(rows):,} of them drawn at random" if len(rows) < total else ""
    return Panels(panels, f"features of {total:,} images{sample}")


def drawn(count: int, most: int | None = None, seed: int = 0) -> np.ndarray:
    """The numbers of `most` of `count` rows, drawn at random and sorted; all if there are no more.

    most: None: MOST_POINTS.
    """
    return np.sort(np.random.RandomState(seed).choice(count, min(count, most or MOST_POINTS), replace=False))


def _embedded(features: np.ndarray, how: Embedding, seed: int) -> tuple[np.ndarray, str]:
    """([N, 2], the name of the axes)."""
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError:
        raise not_installed("a map of features", "scikit-learn", "metrics") from None
    if how == "pca":
        return PCA(2, random_state=seed).fit_transform(features), "PCA"
    perplexity = min(30.0, (len(features) - 1) / 3)  # scikit-learn's default, which must be less than N
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(features), "t-SNE"


def _titled(predictions: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(title, its rows) of each domain and part."""
    return ((f"{domain}, {part}", rows) for domain, part, rows in by_part(predictions))
