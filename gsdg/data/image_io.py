"""Reading one image file as RGB pixels, as Pillow's `convert("RGB")` makes them; errors name the file.

Consequences: grey and palette images get three channels; an alpha channel is dropped, not blended; CMYK is converted
without a colour profile; 16-bit grey is converted as the installed Pillow does it; EXIF orientation is ignored, as in
DomainBed. None of this is corrected, because published accuracies were measured without corrections.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Generator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from gsdg.utils.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
MAX_PIXELS = 89_478_485  # 256 MiB of RGB; above it Pillow warns of a decompression bomb
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # the warning is raised if warnings are errors
# What Pillow raises for damaged files of different formats. OSError covers truncated and unidentified files and errors
# of the disk.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, *BOMBS)


def read_image(path: str) -> Image.Image:
    """Decode an image file to RGB. UserError names a file that is damaged, truncated, empty, too large or missing."""
    with named_faults(path), open(path, "rb") as file:
        return open_image(file).convert("RGB")  # convert decodes the whole image


@contextmanager
def named_faults(path: str) -> Generator[None]:
    """Turn an error that makes the file unreadable into a UserError that names the file."""
    try:
        yield
    except UNREADABLE as error:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        raise UserError(
            f"cannot read image {path} ({size} bytes): {reason(error)}. "
            "Copy it again from its source; leaving it out would shift every split of its domain."
        ) from error


def as_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """An image as `Domain.load` returns it, as a Pillow image in RGB."""
    return (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")


def open_image(file: BinaryIO) -> Image.Image:
    """Open an image and check its size, without decoding it. Raises one of UNREADABLE if it is not a valid image."""
    image = Image.open(file)
    check_size(image)
    return image


def reason(error: Exception) -> str:
    """The message of one of UNREADABLE, without the path or object that Pillow and the system include."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image in a format that Pillow can read"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def check_size(image: Image.Image) -> None:
    """Check the dimensions of an image that is not decoded yet. ValueError: no pixels, or more than MAX_PIXELS."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"it has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the {MAX_PIXELS} that are decoded at most")


def stored_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """(width, height) with a shorter side of at most `short_side`; the aspect ratio is kept to the nearest pixel."""
    short = min(width, height)
    if short <= short_side:
        return width, height
    return max(1, round(width * short_side / short)), max(1, round(height * short_side / short))
