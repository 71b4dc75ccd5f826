"""WILDS' Camelyon17, iWildCam and FMoW -> lists. Each function turns a release's folder into the rows of its list.

Source: Koh et al., ICML 2021 (arXiv:2012.07421), and the splits of its package (github.com/p-lambda/wilds, 4726775),
which it derives from these metadata. In the source domains WILDS' train is `in`, id_val is `out` and id_test is `test`.
What the splits of unseen domains become is said in each function, and in the header of conf/dataset/<name>.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from gsdg.data.download.disk import Damaged
from gsdg.data.download.listed import read_columns

VAL_CENTER, TEST_CENTER = "1", "2"  # numbered from 0, as in the metadata; the paper numbers from 1
VAL_YEAR, TEST_YEAR = 2013, 2016  # the first years of WILDS' val and test


def camelyon17(release: Path) -> pd.DataFrame:
    """Domains: the five hospitals, center_0 to center_4.

    All images of center_1 (WILDS' val) and of center_2 (its test) are `test`, whatever the metadata's split says.
    Lost: WILDS selects models on center_1.
    """
    file = release / "metadata.csv"
    table = read_columns(file, ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split"))
    slide = "patient_" + table["patient"] + "_node_" + table["node"]
    file_name = "patch_" + slide + "_x_" + table["x_coord"] + "_y_" + table["y_coord"] + ".png"
    split = table["split"].mask(table["center"].isin([VAL_CENTER, TEST_CENTER]), "unseen")
    return pd.DataFrame(
        {
            "path": "patches/" + slide + "/" + file_name,
            "label": _mapped(table["tumor"], {"0": "normal", "1": "tumor"}, file),
            "domain": "center_" + table["center"],
            "split": _mapped(split, {"0": "in", "1": "out", "unseen": "test"}, file),
        }
    )


def iwildcam(release: Path) -> pd.DataFrame:
    """Domains: each camera of WILDS' train, camera_<number>, and `unseen_cameras`: all cameras of its val and test.

    Of the unseen cameras, val is `out` and test is `test`, so that the macro F1 of the domain's `test` images is
    WILDS' metric. Lost: which of the unseen cameras took an image. Labels are the metadata's numbers, 0 to 181.
    """
    file = release / "metadata.csv"
    table = read_columns(file, ("split", "location_remapped", "y", "filename"))
    unseen = table["split"].isin(["val", "test"])
    parts = {"train": "in", "id_val": "out", "id_test": "test", "val": "out", "test": "test"}
    return pd.DataFrame(
        {
            "path": "train/" + table["filename"],
            "label": table["y"],
            "domain": ("camera_" + table["location_remapped"]).mask(unseen, "unseen_cameras"),
            "split": _mapped(table["split"], parts, file),
        }
    )


def fmow(release: Path) -> pd.DataFrame:
    """Domains: the years of WILDS' train, year_2002 to year_2012, and from 2013 on the regions, as later_<region>.

    From 2013 on, WILDS' val (fMoW's val, to 2015) is `out`, its test (fMoW's test, from 2016) is `test`, and other
    images are not used, nor is fMoW's split seq. Countries without a region are in the region Other. The file of an
    image has the number of its row in the metadata.
    """
    file = release / "rgb_metadata.csv"
    table = read_columns(file, ("split", "country_code", "category", "timestamp"))
    codes = read_columns(release / "country_code_mapping.csv", ("alpha-3", "region"))
    region = table["country_code"].map(dict(zip(codes["alpha-3"], codes["region"], strict=True)))
    region = region.fillna("Other").replace("", "Other")
    year = table["timestamp"].str[:4].astype(int)  # such as 2015-11-02T08:12:40Z
    later = year >= VAL_YEAR
    is_val, is_test = (table["split"] == "val") & (year < TEST_YEAR), (table["split"] == "test") & (year >= TEST_YEAR)
    rows = pd.DataFrame(
        {
            "path": "images/rgb_img_" + table.index.astype(str) + ".png",
            "label": table["category"],
            "domain": ("year_" + year.astype(str)).mask(later, "later_" + region),
            "split": _mapped(table["split"], {"train": "in", "val": "out", "test": "test", "seq": ""}, file),
        }
    )
    return rows[(table["split"] != "seq") & (~later | is_val | is_test)]


def _mapped(column: pd.Series, words: Mapping[str, str], file: Path) -> pd.Series:
    """The column in other words. Damaged: it has a value that is none of `words`."""
    if unknown := sorted(set(column) - set(words)):
        raise Damaged(file, "metadata file of WILDS", f"unknown {unknown[0]!r} in a column with {', '.join(words)}")
    return column.map(words)
