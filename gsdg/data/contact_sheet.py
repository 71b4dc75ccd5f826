"""A contact sheet: the first image of each class in each domain, on one page, to look at before any training."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gsdg.data.domains import Domain
from gsdg.errors import UserError

THUMB, GAP, MARGIN, MOST = 112, 6, 14, 10  # pixels; and the most classes on a sheet
CAPTION, TEXT = 16, 13  # sizes of type
INK, PALE = "#202020", "#9a9a9a"


def show(source: object, out: Path) -> str:
    """Write the sheet of any data set to the PNG `out`, in one step; what was written, in words."""
    out = Path(out)
    if out.suffix.lower() != ".png" or out.is_dir():
        raise UserError(f"out={out} is not a PNG file's name. Valid: such as {out.with_suffix('.png').name}.")
    dataset = source.read()
    chosen = evenly(len(dataset.classes), MOST)
    names = [dataset.classes[y] for y in chosen]
    some = f"{len(names)} of {len(dataset.classes)}" if len(names) < len(dataset.classes) else len(names)
    shape = f"{len(dataset.domains)} domains x {some} classes"
    rows = {name: [first(domain, y) for y in chosen] for name, domain in dataset.domains.items()}
    _write(sheet(f"{dataset.name}: {shape}, the first image of each", names, rows), out)
    return f"wrote {out}: {shape}"


def evenly(count: int, most: int) -> list[int]:
    """All of 0..count-1, or `most` of them, the first and the last included."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def first(domain: Domain, label: int) -> Image.Image | None:
    """The domain's first image of that label as RGB, None where it has none."""
    found = np.flatnonzero(domain.labels == label)
    if not len(found):
        return None
    image = domain.load(int(found[0]))
    return (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")


def sheet(caption: str, classes: list[str], rows: dict[str, list[Image.Image | None]]) -> Image.Image:
    """The page: a caption, the classes' names above their columns, a domain's name before its row."""
    bold, font = ImageFont.load_default(CAPTION), ImageFont.load_default(TEXT)
    left = MARGIN + round(max(font.getlength(name) for name in rows)) + 2 * GAP
    top = MARGIN + CAPTION + TEXT + 4 * GAP
    step = THUMB + GAP
    width = max(left + step * len(classes), MARGIN + round(bold.getlength(caption)) + GAP) - GAP + MARGIN
    page = Image.new("RGB", (width, top + step * len(rows) - GAP + MARGIN), "white")
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
    """An image in the middle of its square, or where there is none a frame that says so."""
    if image is None:
        draw.rectangle((x, y, x + THUMB - 1, y + THUMB - 1), outline=PALE)
        draw.text((x + THUMB // 2, y + THUMB // 2), "none", PALE, ImageFont.load_default(TEXT), anchor="mm")
        return
    small = thumbnail(image)
    page.paste(small, (x + (THUMB - small.width) // 2, y + (THUMB - small.height) // 2))


def thumbnail(image: Image.Image) -> Image.Image:
    """The whole image with its longer side THUMB pixels; what is enlarged keeps its pixels apart."""
    scale = THUMB / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def shortened(name: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The name, cut so that it is no wider than `width` pixels."""
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
        if temporary.exists():  # not after os.replace
            temporary.unlink()
