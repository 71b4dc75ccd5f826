"""One image file -> RGB pixels, as Pillow's `convert("RGB")` makes them, with errors that name the file.

What that means: grey and palette images get three channels; an alpha channel is dropped, not blended; CMYK is converted
without a colour profile; 16-bit grey is whatever the installed Pillow makes of it; EXIF orientation is ignored, as by
DomainBed. None of it is corrected here, because published accuracies were measured without.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from gsdg.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
MAX_PIXELS = 89_478_485  # 256 MiB of RGB, where Pillow begins to warn of a decompression bomb
# What PIL raises on a damaged file, by format; OSError covers "truncated", "cannot identify" and the disk's own.
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # the latter where warnings are errors
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, *BOMBS)


def read_image(path: str) -> Image.Image:
    """The decoded RGB image. UserError names a file that is damaged, truncated, empty, too large or gone."""
    with faults_named(path), open(path, "rb") as file:
        return open_image(file).convert("RGB")  # convert decodes all of it


@contextmanager
def faults_named(path: str) -> Iterator[None]:
    """What makes a file unreadable becomes a UserError that names it."""
    try:
        yield
    except UNREADABLE as error:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        raise UserError(
            f"cannot read image {path} ({size} bytes): {reason(error)}. "
            "Copy it again from its source; leaving it out would shift every split of its domain."
        ) from error


def open_image(file: BinaryIO) -> Image.Image:
    """The image as stored, its size checked, not yet decoded. One of UNREADABLE where it is none."""
    image = Image.open(file)
    check_size(image)
    return image


def reason(error: Exception) -> str:
    """What one of UNREADABLE says, without the path or the object that Pillow and the system put in."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a format that Pillow knows"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def check_size(image: Image.Image) -> None:
    """ValueError where an image, opened but not yet decoded, has no pixels or too many."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"it has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the {MAX_PIXELS} that are decoded at most")


def stored_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """(width, height) with the shorter side at most `short_side`, the aspect kept to the nearest pixel."""
    short = min(width, height)
    if short <= short_side:
        return width, height
    return max(1, round(width * short_side / short)), max(1, round(height * short_side / short))
