"""MNIST's four IDX files in the folder `raw`, as torchvision's download leaves them; for RotatedMNIST and ColoredMNIST.

Like torchvision, it keeps the compressed files next to the decompressed ones, because torchvision's checksums are those
of the compressed files.
"""

from __future__ import annotations

import gzip
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gsdg.data.download.disk import Damaged, Unusable
from gsdg.data.download.sources import Item, Source
from gsdg.data.download.trees import files, link_or_copy, list_contents
from gsdg.utils.errors import listing

IMAGES = {"train": 60_000, "t10k": 10_000}  # published numbers
NAMES = [f"{part}-{kind}-ubyte" for part in IMAGES for kind in ("images-idx3", "labels-idx1")]
MIRRORS = {  # torchvision's
    "ossci": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "lecun": "http://yann.lecun.com/exdb/mnist/",
}


@dataclass(frozen=True)
class Mnist:
    """The recipe: see `recipes.Recipe`."""

    model: str
    sources: tuple[Source, ...] = tuple(
        Source(mirror, tuple(Item(f"{url}{name}.gz", f"{name}.gz") for name in NAMES))
        for mirror, url in MIRRORS.items()
    )
    archives: tuple[str, ...] = ()

    def build(self, places: Sequence[Path], tree: Path) -> list[str]:
        paths = {path.name.removesuffix(".gz"): path for path in files(places, ("-ubyte", "-ubyte.gz"))}
        if missing := [name for name in NAMES if name not in paths]:
            raise Unusable(f"no {listing(missing)} (or with .gz) found in {list_contents(places)}.")
        (tree / "raw").mkdir(parents=True)
        for name in NAMES:
            link_or_copy(paths[name], tree / "raw" / paths[name].name)
            if paths[name].suffix == ".gz":
                _decompress(paths[name], tree / "raw" / name)
        return []

    def inspect(self, name: str, tree: Path) -> tuple[str, list[str]]:
        """Compare the numbers of images and labels, read as a run reads them, and the checksums of compressed files."""
        from gsdg.data.mnist import read_idx

        try:
            images = {part: len(read_idx(tree / "raw" / f"{part}-images-idx3-ubyte", (28, 28))) for part in IMAGES}
            labels = {part: len(read_idx(tree / "raw" / f"{part}-labels-idx1-ubyte", ())) for part in IMAGES}
        except ValueError as error:
            raise Unusable(str(error)) from error
        faults = [
            f"{part}: {images[part]:,} images and {labels[part]:,} labels found, {published:,} published"
            for part, published in IMAGES.items()
            if not images[part] == labels[part] == published
        ]
        summary = " + ".join(f"{images[part]:,} {part}" for part in IMAGES) + " images"
        return summary, faults + _checksum_faults(tree / "raw")


def _checksum_faults(raw: Path) -> list[str]:
    """A line for each compressed file whose MD5 is not the one in torchvision."""
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import calculate_md5

    sums = {name: (calculate_md5(str(raw / name)), md5) for name, md5 in MNIST.resources if (raw / name).is_file()}
    return [f"{name}: MD5 {actual} found, {md5} published" for name, (actual, md5) in sums.items() if actual != md5]


def _decompress(source: Path, target: Path) -> None:
    try:
        with gzip.open(source, "rb") as packed, open(target, "wb") as file:
            shutil.copyfileobj(packed, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Damaged(source, "gzip file", error) from error
