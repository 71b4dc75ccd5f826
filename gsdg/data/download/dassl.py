"""Two data sets as Dassl reads them -> lists: Digits-DG and miniDomainNet.

Source: Dassl (github.com/KaiyangZhou/Dassl.pytorch), dassl/data/datasets.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from gsdg.data.download.listed import image_rows
from gsdg.data.walk import folders_in

DIGITS = ("mnist", "mnist_m", "svhn", "syn")
MINI_DOMAINS = ("clipart", "painting", "real", "sketch")
SPLITS = {f"{domain}_{split}": (domain, split) for domain in MINI_DOMAINS for split in ("train", "test")}


def digits_dg(release: Path) -> pd.DataFrame:
    """From <domain>/<train or val>/<class>/<file>. Of every domain, train is `in` and val is `out`."""
    tables = [
        image_rows(release, f"{domain}/{split}/{label}", label=label, domain=domain, split=part)
        for domain in DIGITS
        for split, part in (("train", "in"), ("val", "out"))
        for label in folders_in(release / domain / split)
    ]
    return pd.concat(tables, ignore_index=True)


def mini_domainnet(release: Path) -> pd.DataFrame:
    """From DomainNet's folders and splits_mini/<domain>_<train or test>.txt, in which train is `in` and test is `test`.

    A line of these files is a path <domain>/<class>/<file> and, after a space, the number of its class.
    """
    rows = [
        (line.rsplit(" ", 1)[0], domain, "in" if split == "train" else "test")
        for name, (domain, split) in SPLITS.items()
        for line in (release / "splits_mini" / f"{name}.txt").read_text().splitlines()
    ]
    table = pd.DataFrame(rows, columns=["path", "domain", "split"])
    return table.assign(label=table["path"].str.split("/").str[1])
