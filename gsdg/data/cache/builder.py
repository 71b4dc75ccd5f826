"""Building the decoded images of a domain, completely or not at all; refused before the disk is full.

<cache>/<key>/            key: digest of the files' bytes, the versions of the decoder, and short_side
    pixels.bin            the images one after another, each [h, w, 3] uint8
    shapes.npy            [N, 2] int32: height and width of each image
    about.json            domain, number of images, decoder, and the values by which `is_complete` checks the other two
<cache>/seen/<fingerprint>.json
                          the content digest of files with these names, sizes and times, so that they need not be read

A folder that is being built has a hidden name and is renamed when it is complete. A killed build therefore never looks
finished; the next build removes it. A file is read again if its size or one of its times differs, including its change
time, which a program cannot set. Two things go unnoticed: a change on a file system without change times, and damaged
bytes in pixels.bin.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, features

from gsdg.data.dataset import Domain
from gsdg.data.image_io import named_faults, open_image, stored_size
from gsdg.data.parallel import in_parallel
from gsdg.utils.errors import DISK_FULL, UserError
from gsdg.utils.json_files import read_json, write_json

log = logging.getLogger(__name__)
FORMAT = 1
RESERVE = 2**30  # bytes of the disk that are left free; a twentieth of the disk if that is less


class CacheUnavailable(UserError):
    """The cache cannot be built in this folder: too little space, or not writable."""


class ImageHeader(NamedTuple):
    """What is known of an image file before it is decoded."""

    digest: bytes  # SHA-256 of the file
    width: int
    height: int


def content_digest(files: Sequence[ImageHeader]) -> str:
    """SHA-256 over the digests of all files of a domain, in their order."""
    return hashlib.sha256(b"".join(file.digest for file in files)).hexdigest()


def decoder_settings(short_side: int) -> dict:
    """Everything that determines the decoded pixels apart from the files."""
    jpeg = features.version("libjpeg_turbo") or features.version("jpg")
    return {"format": FORMAT, "pillow": PIL.__version__, "jpeg": jpeg, "short_side": short_side}


def cache_key(content: str, short_side: int) -> str:
    """Name of the folder for files with this content digest."""
    text = json.dumps([content, decoder_settings(short_side)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def is_complete(folder: Path) -> bool:
    """Whether the folder holds decoded images: the size of pixels.bin and the digest of shapes.npy are as recorded."""
    about = read_json(folder / "about.json")
    try:
        actual = os.path.getsize(folder / "pixels.bin"), _file_digest(folder / "shapes.npy")
    except OSError:
        return False
    return actual == (about.get("bytes"), about.get("shapes"))


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def image_offsets(shapes: np.ndarray) -> np.ndarray:
    """[N + 1] int64: the byte offset of each image in pixels.bin, and the total size; shapes is [N, 2]."""
    return np.concatenate([[0], np.cumsum(shapes.astype(np.int64).prod(1) * 3)])


def image_view(pixels: np.ndarray, shapes: np.ndarray, offsets: np.ndarray, index: int) -> np.ndarray:
    """[h, w, 3]: a view of one image in the pixels of all images."""
    return pixels[offsets[index] : offsets[index + 1]].reshape(*shapes[index], 3)


def resize_short_side(image: Image.Image, short_side: int | None) -> np.ndarray:
    """[h, w, 3] uint8, resized if the shorter side exceeds `short_side`; None: never resized."""
    size = stored_size(*image.size, short_side) if short_side else image.size
    return np.array(image if size == image.size else image.resize(size, Image.Resampling.BILINEAR))


def inspect_images(domain: Domain) -> list[ImageHeader]:
    """Digest and dimensions of every image, without decoding. UserError: images that cannot be read."""
    return _for_each(_inspect, domain.paths, f"reading {domain.name}")


def _inspect(path: str) -> ImageHeader:
    with named_faults(path):
        data = Path(path).read_bytes()
        return ImageHeader(hashlib.sha256(data).digest(), *open_image(io.BytesIO(data)).size)


def build(domain: Domain, files: Sequence[ImageHeader], folder: Path, part: Path, short_side: int) -> None:
    """Decode all images of the domain into the folder `part`, then rename it to `folder`.

    Args:
        files: of `inspect_images`.
        folder: the final folder; a damaged one is removed first.
        part: a temporary folder in the same parent folder; removed if building fails.
        short_side: see `resize_short_side`.

    Raises:
        CacheUnavailable: not enough space on the disk.
        UserError: images that cannot be read, or that have changed since `inspect_images`.
    """
    sizes = [stored_size(file.width, file.height, short_side) for file in files]
    shapes = np.array([(height, width) for width, height in sizes], np.int32)
    total = int(image_offsets(shapes)[-1])
    shutil.rmtree(folder, ignore_errors=True)
    _check_space(part.parent, total, domain.name)
    log.info("decoding %d images of %s once: %.0f MB in %s", len(files), domain.name, total / 1e6, part.parent)
    try:
        with _full_disk_reported(part.parent, total, domain.name):
            _write_files(part, domain, files, shapes, short_side)
        _publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_files(part: Path, domain: Domain, files: Sequence[ImageHeader], shapes: np.ndarray, short_side: int) -> None:
    """Write pixels.bin, shapes.npy and, when both are complete, about.json into `part`."""
    part.mkdir()
    offsets = image_offsets(shapes)
    pixels = _allocate(part / "pixels.bin", int(offsets[-1]))

    def store(index: int) -> None:
        with named_faults(domain.paths[index]):
            image = _decode(domain.paths[index], files[index].digest)
            image_view(pixels, shapes, offsets, index)[:] = resize_short_side(image, short_side)

    _for_each(store, range(len(files)), f"decoding {domain.name}")
    pixels.flush()
    np.save(part / "shapes.npy", shapes)
    about = {"domain": domain.name, "images": len(files), "bytes": len(pixels), "content": content_digest(files)}
    about |= {"shapes": _file_digest(part / "shapes.npy")} | decoder_settings(short_side)
    write_json(part / "about.json", about)


def _decode(path: str, digest: bytes) -> Image.Image:
    """The RGB image. ValueError: the file changed since its digest was computed, for example while it was copied."""
    data = Path(path).read_bytes()
    if hashlib.sha256(data).digest() != digest:
        raise ValueError("it changed while the data set was read")
    return open_image(io.BytesIO(data)).convert("RGB")


def _publish(part: Path, folder: Path) -> None:
    """Rename `part` to `folder`. Where locks do not work, another process may have built `folder` first."""
    try:
        os.rename(part, folder)
    except OSError:
        if not is_complete(folder):
            raise


def _for_each(function: Callable, items: Sequence, what: str) -> list:
    """[function(item) for each item], in threads. UserError: one error that lists the first faults of all items."""
    results = list(in_parallel(partial(_call_catching, function), items, what))
    faults = [result for result in results if isinstance(result, UserError)]
    if faults:
        more = f"\n... and {len(faults) - 5} more: python -m gsdg.data verify lists them." if len(faults) > 5 else ""
        raise UserError("\n".join(str(fault) for fault in faults[:5]) + more)
    return results


def _call_catching(function: Callable, item: object) -> object:
    """function(item), or the UserError that it raised."""
    try:
        return function(item)
    except UserError as error:
        return error


# ---- disk space ---------------------------------------------------------------------------------------------------


def _allocate(path: Path, size: int) -> np.memmap:
    """Create a memory-mapped file whose `size` bytes are reserved on the disk.

    Without the reservation, a write into a sparse file on a full disk would kill the process with a bus error.
    """
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    return np.memmap(path, np.uint8, "r+", shape=(size,))


def _check_space(folder: Path, needed: int, domain: str) -> None:
    usage = shutil.disk_usage(folder)
    spare = usage.free - min(RESERVE, usage.total // 20)
    if needed > spare:
        raise _no_space(folder, needed, domain, max(0, spare))


@contextmanager
def _full_disk_reported(folder: Path, needed: int, domain: str) -> Generator[None]:
    """Turn an OSError of a full disk into CacheUnavailable."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise _no_space(folder, needed, domain, shutil.disk_usage(folder).free) from error


def _no_space(folder: Path, needed: int, domain: str, spare: int) -> CacheUnavailable:
    return CacheUnavailable(
        f"the decoded images of {domain} take {needed / 1e6:,.0f} MB, {folder} has {spare / 1e6:,.0f} MB to spare. "
        "Set dataset.cache to a folder on a larger disk, a smaller dataset.short_side, or dataset.cache=off."
    )
