"""Building the decoded images of a domain: whole or not at all, refused before the disk is full.

<cache>/<key>/            key: of the files' bytes, the decoder's versions and the bound on the shorter side
    pixels.bin            the images one after another, each [h, w, 3] uint8
    shapes.npy            [N, 2] int32: height and width of each
    about.json            whose they are, how many, how decoded, and how to tell that the others are whole
<cache>/seen/<print>.json what bytes were found in files of these names, sizes and times: they are not read again

A build has a hidden name until it is whole, so a killed one leaves nothing that looks finished; the next removes it.
Files that change without changing size or modification time may go unnoticed; so do damaged bytes in pixels.bin.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, features

from gsdg.data.domains import Domain
from gsdg.data.images import faults_named, open_image, stored_size
from gsdg.data.progress import in_parallel
from gsdg.errors import DISK_FULL, UserError
from gsdg.runs import read_json, write_json

log = logging.getLogger(__name__)
FORMAT = 1
RESERVE = 2**30  # bytes of a disk that are left free, or a twentieth of a small one


class NoRoom(UserError):
    """The cache cannot be built here: no space, or no right to write."""


class File(NamedTuple):
    """What a builder has to know of an image before it is decoded."""

    digest: bytes  # sha256
    width: int
    height: int


def content(files: Sequence[File]) -> str:
    return hashlib.sha256(b"".join(file.digest for file in files)).hexdigest()


def decoder(short_side: int) -> dict:
    """What, beside the files, decides the pixels."""
    jpeg = features.version("libjpeg_turbo") or features.version("jpg")
    return {"format": FORMAT, "pillow": PIL.__version__, "jpeg": jpeg, "short_side": short_side}


def key(bytes_seen: str, short_side: int) -> str:
    text = json.dumps([bytes_seen, decoder(short_side)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def whole(folder: Path) -> bool:
    about = read_json(folder / "about.json")
    try:
        there = os.path.getsize(folder / "pixels.bin"), _digest(folder / "shapes.npy")
    except OSError:
        return False
    return there == (about.get("bytes"), about.get("shapes"))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def starts(shapes: np.ndarray) -> np.ndarray:
    """[N + 1] int64: where in pixels.bin each image begins, and the end."""
    return np.concatenate([[0], np.cumsum(shapes.astype(np.int64).prod(1) * 3)])


def placed(pixels: np.ndarray, shapes: np.ndarray, begins: np.ndarray, index: int) -> np.ndarray:
    """[h, w, 3], a view: an image's own part of all pixels."""
    return pixels[begins[index] : begins[index + 1]].reshape(*shapes[index], 3)


def shrunk(image: Image.Image, short_side: int | None) -> np.ndarray:
    """[h, w, 3] uint8, the shorter side at most `short_side`."""
    size = stored_size(*image.size, short_side) if short_side else image.size
    return np.array(image if size == image.size else image.resize(size, Image.Resampling.BILINEAR))


def inspected(domain: Domain) -> list[File]:
    """Digest and size of every image, without decoding one. UserError as `build`'s."""
    return _each(_inspect, domain.files, f"reading {domain.name}")


def _inspect(path: str) -> File:
    with faults_named(path):
        data = Path(path).read_bytes()
        return File(hashlib.sha256(data).digest(), *open_image(io.BytesIO(data)).size)


def build(domain: Domain, files: Sequence[File], folder: Path, part: Path, short_side: int) -> None:
    """Decode into `part`, then call it `folder`. UserError: NoRoom; images that cannot be read; images that changed."""
    sizes = [stored_size(file.width, file.height, short_side) for file in files]
    shapes = np.array([(height, width) for width, height in sizes], np.int32)
    total = int(starts(shapes)[-1])
    shutil.rmtree(folder, ignore_errors=True)  # damaged, if it is there
    _check_room(part.parent, total, domain.name)
    log.info("decoding %d images of %s once: %.0f MB in %s", len(files), domain.name, total / 1e6, part.parent)
    try:
        with _room_refused(part.parent, total, domain.name):
            _fill(part, domain, files, shapes, short_side)
        _publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fill(part: Path, domain: Domain, files: Sequence[File], shapes: np.ndarray, short_side: int) -> None:
    """Write all of a finished folder's files below `part`."""
    part.mkdir()
    begins = starts(shapes)
    pixels = _allocate(part / "pixels.bin", int(begins[-1]))

    def store(index: int) -> None:
        with faults_named(domain.files[index]):
            image = _decoded(domain.files[index], files[index].digest)
            placed(pixels, shapes, begins, index)[:] = shrunk(image, short_side)

    _each(store, range(len(files)), f"decoding {domain.name}")
    pixels.flush()
    np.save(part / "shapes.npy", shapes)
    about = {"domain": domain.name, "images": len(files), "bytes": len(pixels), "content": content(files)}
    write_json(part / "about.json", about | {"shapes": _digest(part / "shapes.npy")} | decoder(short_side))


def _decoded(path: str, digest: bytes) -> Image.Image:
    """The RGB image of the bytes that the key was made of: the data set may still be being copied."""
    data = Path(path).read_bytes()
    if hashlib.sha256(data).digest() != digest:
        raise ValueError("it changed while the data set was read")
    return open_image(io.BytesIO(data)).convert("RGB")


def _publish(part: Path, folder: Path) -> None:
    """Give the finished folder its name; where locks do not work, another builder may have been faster."""
    try:
        os.rename(part, folder)
    except OSError:
        if not whole(folder):
            raise


def _each(function: Callable, items: Sequence, what: str) -> list:
    """[function(item) ..], by threads; all faults in one error."""
    results = list(in_parallel(partial(_caught, function), items, what))
    faults = [result for result in results if isinstance(result, UserError)]
    if faults:
        more = f"\n... and {len(faults) - 5} more: python -m gsdg.data verify lists them." if len(faults) > 5 else ""
        raise UserError("\n".join(str(fault) for fault in faults[:5]) + more)
    return results


def _caught(function: Callable, item: object) -> object:
    try:
        return function(item)
    except UserError as error:
        return error


# ---- the disk -----------------------------------------------------------------------------------------------------


def _allocate(path: Path, size: int) -> np.memmap:
    """A file of `size` bytes that the disk has promised: a write into a sparse one would kill the process."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    return np.memmap(path, np.uint8, "r+", shape=(size,))


def _check_room(folder: Path, needed: int, domain: str) -> None:
    usage = shutil.disk_usage(folder)
    spare = usage.free - min(RESERVE, usage.total // 20)
    if needed > spare:
        raise _no_room(folder, needed, domain, max(0, spare))


@contextmanager
def _room_refused(folder: Path, needed: int, domain: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise _no_room(folder, needed, domain, shutil.disk_usage(folder).free) from error


def _no_room(folder: Path, needed: int, domain: str, spare: int) -> NoRoom:
    return NoRoom(
        f"{domain} decoded takes {needed / 1e6:,.0f} MB, {folder} has {spare / 1e6:,.0f} MB to spare. "
        "Set dataset.cache to a folder on a larger disk, a smaller dataset.short_side, or dataset.cache=off."
    )
