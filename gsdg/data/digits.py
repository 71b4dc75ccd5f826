"""RotatedDigits: 1,797 handwritten digits in domains that differ by rotation; ships with the package, no download.

Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), CC BY 4.0, in the copy that
scikit-learn's `load_digits` bundles (8 x 8 pixels, values 0..16), kept beside this file as digits.npz.
Domains are made as DomainBed makes RotatedMNIST's: shuffle once, domain i of k takes every k-th digit from the i-th on,
so a digit lives in one domain only; rotation is counterclockwise, bilinear, black outside.
As MNIST's, the digits are enlarged to 20 x 20 in the middle of 28 x 28: a rotation cuts no corner of the ink.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from gsdg.data.domains import Domain, DomainDataset
from gsdg.errors import UserError

SIZE, INNER = 28, 20


class RotatedDigits:
    """A domain's name is its angle in whole degrees ("0", "15", ..). `seed` decides which digits a domain gets."""

    augment = "none"

    def __init__(self, *, name: str, domains: Sequence[str], seed: int = 0) -> None:
        if wrong := [angle for angle in domains if not _is_angle(angle)]:
            raise UserError(f"dataset.domains: {wrong} are not angles. Valid: whole degrees as text, such as '15'.")
        if not domains or len(set(domains)) < len(domains):
            raise UserError(f"dataset.domains={list(domains)}: name at least one angle, each once.")
        if not 0 <= seed < 2**32:
            raise UserError(f"dataset.seed={seed}. Valid: 0 <= seed < 2**32.")
        self.name = name
        self.domains = list(domains)
        self.seed = seed

    def read(self) -> DomainDataset:
        images, labels = load_digits()
        order = np.random.RandomState(self.seed).permutation(len(labels))
        domains = {}
        for i, name in enumerate(self.domains):
            own = order[i :: len(self.domains)]
            pixels = np.stack([_rotated(image, int(name)) for image in images[own]])  # [N, 28, 28] uint8
            domains[name] = Domain(name, labels[own], partial(_load, pixels))
        return DomainDataset(self.name, [str(digit) for digit in range(10)], domains)


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """(images [1797, 8, 8] uint8 in 0..16, labels [1797] int64), in scikit-learn's order."""
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        return stored["images"], stored["labels"].astype(np.int64)


def _rotated(image: np.ndarray, angle: int) -> np.ndarray:
    """[8, 8] in 0..16 -> [28, 28] in 0..255, turned counterclockwise."""
    pixels = np.round(image * (255 / 16)).astype(np.uint8)
    large = Image.fromarray(pixels).resize((INNER, INNER), Image.Resampling.BILINEAR)
    framed = np.pad(np.asarray(large), (SIZE - INNER) // 2)
    return np.asarray(Image.fromarray(framed).rotate(angle, Image.Resampling.BILINEAR))


def _load(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])


def _is_angle(name: object) -> bool:
    return isinstance(name, str) and name.removeprefix("-").isdecimal() and str(int(name)) == name
