"""Digits in domains that differ by rotation or by colour, built as DomainBed builds its MNISTs; 1,797 ship with gsdg.

A data set here is a pool of digits x what is done to them: RotatedDigits and ColoredDigits have the embedded pool,
RotatedMNIST and ColoredMNIST (mnist.py) have MNIST's. The pool is shuffled once and domain i of k takes every k-th
digit from the i-th on, so a digit lives in one domain only.
Embedded: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), CC BY 4.0, in the copy that
scikit-learn's `load_digits` bundles (8 x 8 pixels, values 0..16), kept beside this file as digits.npz. As MNIST's, they
are enlarged to 20 x 20 in the middle of 28 x 28: a rotation cuts no corner of the ink.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from gsdg.data.domains import Domain, DomainDataset
from gsdg.errors import UserError

SIZE, INNER = 28, 20
LABEL_NOISE = 0.25  # ColoredMNIST's: colour tells more of the label than the digit does
SIGNED_PERCENT = r"[+-](0|[1-9][0-9]?|100)%"


class Digits:
    """What all have in common; a subclass adds `_pool`, and what its domains' names mean. `seed` decides all draws."""

    augment = "none"
    cache = None  # the images are in memory
    channels: int
    classes: list[str]

    def __init__(self, *, name: str, domains: Sequence[str], seed: int = 0) -> None:
        self._check_names(domains)
        if not domains or len(set(domains)) < len(domains):
            raise UserError(f"dataset.domains={list(domains)}: name at least one domain, each once.")
        if not 0 <= seed < 2**32:
            raise UserError(f"dataset.seed={seed}. Valid: 0 <= seed < 2**32.")
        self.name = name
        self.domains = list(domains)
        self.seed = seed

    def read(self) -> DomainDataset:
        images, labels = self._pool()
        generator = torch.Generator().manual_seed(self.seed)
        order = self._order(len(labels), generator)
        domains = {}
        for i, name in enumerate(self.domains):
            own = order[i :: len(self.domains)]
            domains[name] = self._domain(name, images[own], labels[own], generator)
        return DomainDataset(self.name, list(self.classes), domains)

    def _order(self, n: int, generator: Generator) -> np.ndarray:
        return torch.randperm(n, generator=generator).numpy()

    def _pool(self) -> tuple[np.ndarray, np.ndarray]:
        """(images [N, 28, 28] uint8, labels [N] int64 in 0..9)."""
        raise NotImplementedError

    def _check_names(self, domains: Sequence[str]) -> None:
        """UserError: a name does not say what is to be done."""
        raise NotImplementedError

    def _domain(self, name: str, images: np.ndarray, labels: np.ndarray, generator: Generator) -> Domain:
        raise NotImplementedError


class Rotated(Digits):
    """A domain's name is its angle in whole degrees ("0", "15", ..): counterclockwise, bilinear, black outside."""

    channels = 1
    classes = [str(digit) for digit in range(10)]

    def _check_names(self, domains: Sequence[str]) -> None:
        if wrong := [angle for angle in domains if not _is_angle(angle)]:
            raise UserError(f"dataset.domains: {wrong} are not angles. Valid: whole degrees as text, such as '15'.")

    def _domain(self, name: str, images: np.ndarray, labels: np.ndarray, generator: Generator) -> Domain:
        turned = [Image.fromarray(image).rotate(int(name), Image.Resampling.BILINEAR) for image in images]
        return Domain(name, labels, partial(_load, np.stack(turned)))  # [N, 28, 28] uint8


class Colored(Digits):
    """Red or green digits, two classes. Class 1 is 0 to 4, but every fourth label is wrong (DomainBed's numbers).

    In domain "+90%" green means class 1 and red class 0 for 90 of 100 images, in "-90%" it is the other way round for
    90 of 100. Images are RGB with an empty blue, to be looked at; models get the red and the green channel.
    """

    channels = 2
    classes = ["5 to 9", "0 to 4"]

    def _check_names(self, domains: Sequence[str]) -> None:
        if wrong := [name for name in domains if not (isinstance(name, str) and re.fullmatch(SIGNED_PERCENT, name))]:
            raise UserError(
                f"dataset.domains: {wrong} are not correlations of colour and label. "
                "Valid: a sign and whole percents as text, such as '+90%' or '-90%'."
            )

    def _domain(self, name: str, images: np.ndarray, labels: np.ndarray, generator: Generator) -> Domain:
        percent = int(name[1:-1])
        disagree = (100 - percent if name[0] == "+" else percent) / 100
        wanted = _flipped(torch.from_numpy(labels) < 5, LABEL_NOISE, generator)
        colors = _flipped(wanted, disagree, generator)  # False: red, True: green
        return Domain(name, wanted.long().numpy(), partial(_load_colored, images, colors.long().numpy()))


class Embedded(Digits):
    """The pool that ships with gsdg."""

    def _pool(self) -> tuple[np.ndarray, np.ndarray]:
        images, labels = load_digits()
        return np.stack([_enlarged(image) for image in images]), labels


class RotatedDigits(Embedded, Rotated):
    """The embedded digits, turned."""

    def _order(self, n: int, generator: Generator) -> np.ndarray:
        return np.random.RandomState(self.seed).permutation(n)  # older than ColoredDigits: published results have it


class ColoredDigits(Embedded, Colored):
    """The embedded digits, coloured."""


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """(images [1797, 8, 8] uint8 in 0..16, labels [1797] int64), in scikit-learn's order."""
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        return stored["images"], stored["labels"].astype(np.int64)


def _enlarged(image: np.ndarray) -> np.ndarray:
    """[8, 8] in 0..16 -> [28, 28] in 0..255."""
    pixels = np.round(image * (255 / 16)).astype(np.uint8)
    large = Image.fromarray(pixels).resize((INNER, INNER), Image.Resampling.BILINEAR)
    return np.pad(np.asarray(large), (SIZE - INNER) // 2)


def _flipped(bits: Tensor, probability: float, generator: Generator) -> Tensor:
    """[N] bool, each turned over with `probability`."""
    return bits ^ (torch.rand(len(bits), generator=generator) < probability)


def _load(images: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(images[index])


def _load_colored(images: np.ndarray, colors: np.ndarray, index: int) -> Image.Image:
    rgb = np.zeros((*images.shape[1:], 3), np.uint8)
    rgb[..., colors[index]] = images[index]
    return Image.fromarray(rgb)


def _is_angle(name: object) -> bool:
    return isinstance(name, str) and name.removeprefix("-").isdecimal() and str(int(name)) == name
