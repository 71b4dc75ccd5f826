"""A contact sheet: the first image of each class in each domain on one page, to look at before training."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gsdg.data import DataSource
from gsdg.data.dataset import Domain
from gsdg.data.image_io import as_rgb
from gsdg.utils.errors import UserError
from gsdg.utils.text import printable

THUMB, GAP, MARGIN = 112, 6, 14  # pixels
MOST = 10  # classes on a sheet
CAPTION, TEXT = 16, 13  # font sizes
INK, PALE = "#202020", "#9a9a9a"


def show(source: DataSource, out: Path) -> str:
    """Write the contact sheet of a dataset, atomically, and return a line that says what was written.

    Args:
        source: the dataset object.
        out: the PNG file to write.

    Raises:
        UserError: `out` is not the name of a PNG file or cannot be written.
    """
    out = Path(out)
    if out.suffix.lower() != ".png" or out.is_dir():
        raise UserError(f"out={out} is not the name of a PNG file. Valid, for example: {out.with_suffix('.png').name}.")
    dataset = source.read()
    labels = evenly_spaced(len(dataset.classes), MOST)
    names = [printable(dataset.classes[y]) for y in labels]
    classes = f"{len(names)} of {len(dataset.classes)}" if len(names) < len(dataset.classes) else len(names)
    shape = f"{len(dataset.domains)} domains x {classes} classes"
    rows = {printable(name): [first_image(domain, y) for y in labels] for name, domain in dataset.domains.items()}
    _write(sheet(f"{dataset.name}: {shape}, the first image of each", names, rows), out)
    return f"wrote {out}: {shape}"


def evenly_spaced(count: int, most: int) -> list[int]:
    """0..count-1, or `most` evenly spaced numbers of them, including the first and the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def first_image(domain: Domain, label: int) -> Image.Image | None:
    """The domain's first image with this label as RGB, or None if it has none."""
    indices = np.flatnonzero(domain.labels == label)
    if not len(indices):
        return None
    return as_rgb(domain.load(int(indices[0])))


def sheet(caption: str, classes: list[str], rows: dict[str, list[Image.Image | None]]) -> Image.Image:
    """Draw the page: a caption, a column per class, a row per domain.

    Args:
        caption: text at the top.
        classes: names of the columns.
        rows: {name of the domain: one image per class, or None}.
    """
    # Sizes: names to the left of the rows, the caption and the class names above.
    bold, font = ImageFont.load_default(CAPTION), ImageFont.load_default(TEXT)
    left = MARGIN + round(max(font.getlength(name) for name in rows)) + 2 * GAP
    top = MARGIN + CAPTION + TEXT + 4 * GAP
    step = THUMB + GAP
    width = max(left + step * len(classes), MARGIN + round(bold.getlength(caption)) + GAP) - GAP + MARGIN
    page = Image.new("RGB", (width, top + step * len(rows) - GAP + MARGIN), "white")
    # Text and images.
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), caption, INK, bold)
    for x, name in enumerate(classes):
        draw.text((left + step * x + THUMB // 2, top - GAP), shortened(name, font, THUMB), INK, font, anchor="md")
    for y, (name, images) in enumerate(rows.items()):
        draw.text((left - 2 * GAP, top + step * y + THUMB // 2), name, INK, font, anchor="rm")
        for x, image in enumerate(images):
            _place(page, draw, image, left + step * x, top + step * y)
    return page


def _place(page: Image.Image, draw: ImageDraw.ImageDraw, image: Image.Image | None, x: int, y: int) -> None:
    """Paste an image in the middle of its square; for None, draw an empty frame with the word "none"."""
    if image is None:
        draw.rectangle((x, y, x + THUMB - 1, y + THUMB - 1), outline=PALE)
        draw.text((x + THUMB // 2, y + THUMB // 2), "none", PALE, ImageFont.load_default(TEXT), anchor="mm")
        return
    small = thumbnail(image)
    page.paste(small, (x + (THUMB - small.width) // 2, y + (THUMB - small.height) // 2))


def thumbnail(image: Image.Image) -> Image.Image:
    """Resize the image so that its longer side has THUMB pixels; small images are enlarged without interpolation."""
    scale = THUMB / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def shortened(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The name, cut off if it is wider than `width` pixels."""
    if font.getlength(name) <= width:
        return name
    while name and font.getlength(name + "..") > width:
        name = name[:-1]
    return name + ".."


def _write(page: Image.Image, out: Path) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        page.save(temporary, "PNG")
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}. Name another file with --out.") from error
    finally:
        if temporary.exists():  # os.replace did not happen
            temporary.unlink()
