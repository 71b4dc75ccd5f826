"""Shapes, a data set of four classes (circle, cross, square, triangle) in four styles, drawn with Pillow.

An image is drawn when it is loaded: 28 x 28 pixels, grey. Its class, place, size and angle depend on the seed, the
domain's name and the image's number only, so that every process and every run sees the same image.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from gsdg.data.dataset import Domain, DomainDataset, check_domain_names
from gsdg.utils.errors import UserError, check_range, listing

SIZE, FINER = 28, 4  # pixels; drawn FINER times as large and then reduced, so that edges are smooth
CLASSES = ["circle", "cross", "square", "triangle"]
STYLES = ["filled", "outline", "blurred", "noisy"]


class Shapes:
    """A `gsdg.data.DataSource`: one domain per style.

    Args:
        name: name of the data set.
        domains: names of the styles, each once.
        images: number of images per domain, >= 1.
        seed: of all random draws, >= 0.
    Raises:
        UserError: for an unknown style and for values outside these ranges.
    """

    augment: Literal["none"] = "none"
    channels = 1
    cache = None  # nothing is decoded

    def __init__(self, *, name: str, domains: Sequence[str] = tuple(STYLES), images: int = 400, seed: int = 0) -> None:
        check_domain_names(domains)
        check_range("dataset", "[1, inf)", images=images)
        check_range("dataset", "[0, inf)", seed=seed)
        if unknown := [style for style in domains if style not in STYLES]:
            raise UserError(f"dataset.domains: there is no style {listing(unknown)}. Valid: {listing(STYLES)}.")
        self.name, self.domains, self.images, self.seed = name, list(domains), images, seed

    def read(self) -> DomainDataset:
        """All domains. No image is drawn yet."""
        labels = np.arange(self.images, dtype=np.int64) % len(CLASSES)  # [N], every class equally often
        domains = {style: Domain(style, labels, partial(draw_image, style, self.seed)) for style in self.domains}
        return DomainDataset(self.name, CLASSES, domains)


def draw_image(style: str, seed: int, index: int) -> Image.Image:
    """The image of this number, grey, 28 x 28; its class is index % 4. Of the module, so that workers can load it."""
    random = np.random.default_rng((seed, zlib.crc32(style.encode()), index))
    side = SIZE * FINER
    x, y = random.uniform(0.4, 0.6, 2) * side
    radius, angle = random.uniform(0.22, 0.36) * side, random.uniform(-20, 20)
    image = Image.new("L", (side, side))
    line = FINER * 2 if style == "outline" else 0
    draw_shape(ImageDraw.Draw(image), CLASSES[index % len(CLASSES)], (x, y), radius, angle, line)
    image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    if style == "blurred":
        return image.filter(ImageFilter.GaussianBlur(2))
    if style == "noisy":
        pixels = 0.6 * np.asarray(image) + random.normal(50, 50, (SIZE, SIZE))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], radius: float, angle: float, line: int
) -> None:
    """Draw one white shape. angle: in degrees. line: width of its outline in pixels; 0: filled."""
    fill, x, y = None if line else 255, *centre
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill, outline=255, width=line)
        return
    polar = [(angle + degrees, radius * length) for degrees, length in CORNERS[shape]]
    corners = [(x + r * math.cos(math.radians(a)), y + r * math.sin(math.radians(a))) for a, r in polar]
    draw.polygon(corners, fill, outline=255, width=line)


ARM = math.degrees(math.atan2(1, 3))  # of a cross whose arms are as wide as a third of it
CORNERS = {  # (degrees, distance from the centre in radii) of each corner
    "square": [(45 + 90 * i, 1.0) for i in range(4)],
    "triangle": [(120 * i - 90, 1.0) for i in range(3)],
    "cross": [
        corner
        for i in range(4)
        for corner in ((90 * i - ARM, 1.0), (90 * i + ARM, 1.0), (90 * i + 45, math.hypot(1, 1) / math.hypot(1, 3)))
    ],
}
