"""A release with metadata of its own -> the images that its metadata name, and `list.csv`, which `ImageList` reads.

Images keep their paths in the release, and their bytes. A list has the columns path, label, domain and, if the data set
has an official split, split.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from gsdg.data.download.disk import Damaged, Unusable
from gsdg.data.download.sources import Source
from gsdg.data.download.trees import link_or_copy, list_contents, walk
from gsdg.data.list_table import count_rows, read_table
from gsdg.data.published_counts import count_faults
from gsdg.data.walk import images_in
from gsdg.utils.errors import listing
from gsdg.utils.progress import Progress

LIST = "list.csv"
MOST_DOMAINS = 24  # whose numbers of images are in the report


@dataclass(frozen=True)
class Listed:
    """The recipe of a list.

    Args:
        sources: where it is published.
        contents: paths of files and folders; the release is the first folder, breadth first, that has all of them.
        rows: the release's folder -> the list, a frame of text with the columns path (relative to the folder), label,
            domain and optionally split, a row per image.
        split: the overrides of a run on the official split, or without one, of the usual run.
        archives: see `recipes.Recipe`.
        model: see `recipes.Recipe`.
    """

    sources: tuple[Source, ...]
    contents: tuple[str, ...]
    rows: Callable[[Path], pd.DataFrame]
    split: str
    archives: tuple[str, ...] = ()
    model: str = "resnet18"

    def build(self, places: Sequence[Path], tree: Path) -> list[str]:
        release = find_folder(places, self.contents)
        if release is None:
            raise Unusable(f"no folder with {listing(self.contents[:8])} found in {list_contents(places)}.")
        rows = self.rows(release)
        exists = [(release / path).is_file() for path in rows["path"]]
        missing, rows = [path for path, here in zip(rows["path"], exists, strict=True) if not here], rows[exists]
        if rows.empty:
            raise Unusable(f"none of the {len(missing):,} images that the list needs is in {release}.")
        with Progress("copying", len(rows), "images") as progress:
            for path in rows["path"]:
                link_or_copy(release / path, tree / path)
                progress.add(1)
        rows.to_csv(tree / LIST, index=False)
        return [f"{len(missing):,} listed images are missing, first {missing[0]}: left out"] if missing else []

    def inspect(self, name: str, tree: Path) -> tuple[str, list[str]]:
        counts, parts = count_rows(read_table(tree / LIST))
        totals = {domain: sum(by_label.values()) for domain, by_label in counts.items()}
        labels = {label for by_label in counts.values() for label in by_label}
        summary = f"{sum(totals.values()):,} images, {len(labels)} classes, {len(totals)} domains"
        if len(totals) <= MOST_DOMAINS:
            summary += ": " + listing(f"{domain} {total:,}" for domain, total in totals.items())
        if parts:
            summary += f"; official split: {listing(f'{total:,} {part}' for part, total in parts.items())}"
        return summary, count_faults(name, counts, parts)


def find_folder(places: Sequence[Path], contents: Sequence[str]) -> Path | None:
    """The first folder in `places`, breadth first, that has all these files and folders; None: there is none."""
    folders = (folder for place in places for folder in walk(place))
    return next((folder for folder in folders if all((folder / name).exists() for name in contents)), None)


def image_rows(release: Path, folder: str, which: slice = slice(None), **columns: str) -> pd.DataFrame:
    """Rows of the images in a folder of the release, sorted by path.

    Args:
        which: the images to take.
        columns: the values of the other columns, the same in every row.
    """
    paths = sorted(os.path.relpath(path, release) for path in images_in(release / folder))[which]
    return pd.DataFrame({"path": paths}).assign(**columns)


def read_columns(file: Path, columns: Sequence[str]) -> pd.DataFrame:
    """These columns of a CSV file, as text. Damaged: it cannot be read, or lacks one."""
    try:
        return pd.read_csv(file, usecols=list(columns), dtype=str, na_filter=False)
    except ValueError as error:  # also pandas's errors for files that are no CSV
        raise Damaged(file, f"CSV file with the columns {listing(columns)}", error) from error
