"""MNIST's four IDX files -> `raw/`, as torchvision's download leaves them; RotatedMNIST and ColoredMNIST share it.

torchvision keeps what it downloaded beside what it decompressed, and so does this: the checksums it has are of those.
"""

from __future__ import annotations

import gzip
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gsdg.data.prepare.disk import Damaged, Unusable
from gsdg.data.prepare.sources import Item, Source
from gsdg.data.prepare.trees import described, files, put
from gsdg.errors import listing

IMAGES = {"train": 60_000, "t10k": 10_000}
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
        Source(name, tuple(Item(f"{url}{one}.gz", f"{one}.gz") for one in NAMES)) for name, url in MIRRORS.items()
    )

    archives: tuple[str, ...] = ()

    def build(self, places: Sequence[Path], tree: Path) -> list[str]:
        found = {path.name.removesuffix(".gz"): path for path in files(places, ("-ubyte", "-ubyte.gz"))}
        if missing := [name for name in NAMES if name not in found]:
            raise Unusable(f"no {listing(missing)} (or with .gz) found in {described(places)}.")
        (tree / "raw").mkdir(parents=True)
        for name in NAMES:
            put(found[name], tree / "raw" / found[name].name)
            if found[name].suffix == ".gz":
                _decompress(found[name], tree / "raw" / name)
        return []

    def inspect(self, name: str, tree: Path) -> tuple[str, list[str]]:
        """Read as a run would; by their contents, then by the checksums of those that came compressed."""
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
        said = " + ".join(f"{images[part]:,} {part}" for part in IMAGES) + " images"
        return said, faults + _other_checksums(tree / "raw")


def _other_checksums(raw: Path) -> list[str]:
    """A line for each compressed file that is not the one torchvision knows."""
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import calculate_md5

    found = {name: (calculate_md5(str(raw / name)), md5) for name, md5 in MNIST.resources if (raw / name).is_file()}
    return [f"{name}: MD5 {own} found, {md5} published" for name, (own, md5) in found.items() if own != md5]


def _decompress(source: Path, target: Path) -> None:
    try:
        with gzip.open(source, "rb") as packed, open(target, "wb") as file:
            shutil.copyfileobj(packed, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Damaged(source, "gzip file", error) from error
