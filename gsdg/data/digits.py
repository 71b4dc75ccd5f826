"""Datasets of digits whose domains differ by rotation or by colour, built as DomainBed builds its MNIST datasets.

A dataset is a pool of digits x what is done to them: RotatedDigits and ColoredDigits use the 1,797 digits that ship
with gsdg, RotatedMNIST and ColoredMNIST (mnist.py) use MNIST. The pool is shuffled once, and domain i of k takes every
k-th digit starting at the i-th, so no digit is in two domains.

Source of the shipped digits: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), CC BY 4.0, in
the copy that scikit-learn's `load_digits` bundles (8 x 8 pixels, values 0..16), stored next to this file as digits.npz.
As in MNIST, they are enlarged to 20 x 20 in the middle of 28 x 28, so that a rotation cuts nothing off.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from gsdg.data.dataset import Domain, DomainDataset, check_domain_names
from gsdg.utils.errors import UserError

SIZE, INNER = 28, 20  # pixels: the image, and the enlarged digit in it
LABEL_NOISE = 0.25  # ColoredMNIST's: the colour predicts the label better than the digit does
SIGNED_PERCENT = r"[+-](0|[1-9][0-9]?|100)%"


class Digits:
    """Base class. A subclass defines `_pool`, and `_check_names` and `_domain` for the meaning of a domain's name.

    Args:
        name: name of the dataset.
        domains: names of the domains, at least one, each once.
        seed: determines all random draws (which digit is in which domain, label noise, colours), 0 <= seed < 2**32.
    """

    augment: Literal["none"] = "none"
    cache: None = None  # the images are in memory
    channels: int
    classes: list[str]

    def __init__(self, *, name: str, domains: Sequence[str | int], seed: int = 0) -> None:
        domains = [str(domain) for domain in domains]  # Hydra reads the angle 15 as a number
        self._check_names(domains)
        check_domain_names(domains)
        if not 0 <= seed < 2**32:
            raise UserError(f"dataset.seed={seed}. Valid: 0 <= seed < 2**32.")
        self.name = name
        self.domains = list(domains)
        self.seed = seed

    def read(self) -> DomainDataset:
        """Build all domains."""
        images, labels = self._pool()
        generator = torch.Generator().manual_seed(self.seed)
        order = self._order(len(labels), generator)
        domains = {}
        for i, name in enumerate(self.domains):
            indices = order[i :: len(self.domains)]
            domains[name] = self._domain(name, images[indices], labels[indices], generator)
        return DomainDataset(self.name, list(self.classes), domains)

    def _order(self, n: int, generator: Generator) -> np.ndarray:
        return torch.randperm(n, generator=generator).numpy()

    def _pool(self) -> tuple[np.ndarray, np.ndarray]:
        """(images [N, 28, 28] uint8, labels [N] int64 in 0..9)."""
        raise NotImplementedError

    def _check_names(self, domains: Sequence[str]) -> None:
        """UserError: a name does not have the form that this dataset needs."""
        raise NotImplementedError

    def _domain(self, name: str, images: np.ndarray, labels: np.ndarray, generator: Generator) -> Domain:
        """Build one domain from its digits; `generator` is shared by all domains, in their order."""
        raise NotImplementedError


class Rotated(Digits):
    """Rotated digits, 10 classes; a domain's name is the angle in whole degrees, such as "15".

    Rotation is counterclockwise with bilinear interpolation and a black background.
    """

    channels = 1
    classes = [str(digit) for digit in range(10)]

    def _check_names(self, domains: Sequence[str]) -> None:
        if wrong := [angle for angle in domains if not _is_angle(angle)]:
            raise UserError(f"dataset.domains: {wrong} are not angles. Valid: whole degrees, such as 15.")

    def _domain(self, name: str, images: np.ndarray, labels: np.ndarray, generator: Generator) -> Domain:
        rotated = [Image.fromarray(image).rotate(int(name), Image.Resampling.BILINEAR) for image in images]
        pixels = np.stack([np.asarray(image) for image in rotated])  # [N, 28, 28] uint8
        return Domain(name, labels, partial(_load, pixels), load_many=partial(_rows, pixels))


class Colored(Digits):
    """Red or green digits with two classes. Class 1 is the digits 0 to 4; 25% of the labels are flipped at random.

    In domain "+90%", 90% of the images of class 1 are green and 90% of those of class 0 are red; in "-90%" the colours
    are exchanged. Images are RGB with an empty blue channel, so that they can be displayed; models get the red and the
    green channel. Label noise and colours follow DomainBed's ColoredMNIST.
    """

    channels = 2
    classes = ["5 to 9", "0 to 4"]

    def _check_names(self, domains: Sequence[str]) -> None:
        if wrong := [name for name in domains if not re.fullmatch(SIGNED_PERCENT, name)]:
            raise UserError(
                f"dataset.domains: {wrong} are not correlations of colour and label. "
                "Valid: a sign and whole percents as text, such as '+90%' or '-90%'."
            )

    def _domain(self, name: str, images: np.ndarray, labels: np.ndarray, generator: Generator) -> Domain:
        percent = int(name[1:-1])
        disagreement = (100 - percent if name[0] == "+" else percent) / 100  # P(colour != label)
        noisy_labels = _flipped(torch.from_numpy(labels) < 5, LABEL_NOISE, generator)
        colors = _flipped(noisy_labels, disagreement, generator)  # False: red, True: green
        load_many = partial(_colored_rows, images, colors.long().numpy())
        return Domain(name, noisy_labels.long().numpy(), partial(_load_colored, load_many), load_many=load_many)


class Embedded(Digits):
    """The pool of digits that ships with gsdg."""

    def _pool(self) -> tuple[np.ndarray, np.ndarray]:
        images, labels = load_digits()
        return np.stack([_enlarged(image) for image in images]), labels


class RotatedDigits(Embedded, Rotated):
    """The shipped digits, rotated: 10 classes.

    Args:
        name: name of the dataset.
        domains: angles in whole degrees, counterclockwise, such as "15"; at least one, each once.
        seed: determines which digit is in which domain, 0 <= seed < 2**32.
    """

    def _order(self, n: int, generator: Generator) -> np.ndarray:
        # NumPy's generator instead of torch's: published results of this dataset use this order.
        return np.random.RandomState(self.seed).permutation(n)


class ColoredDigits(Embedded, Colored):
    """The shipped digits, coloured red or green: 2 classes, see `Colored`.

    Args:
        name: name of the dataset.
        domains: correlations of colour and label, a sign and whole percents such as "+90%"; at least one, each once.
        seed: determines which digit is in which domain, the label noise and the colours, 0 <= seed < 2**32.
    """


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
    """[N] bool, each bit inverted with the given probability."""
    return bits ^ (torch.rand(len(bits), generator=generator) < probability)


def _load(images: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(images[index])


def _rows(images: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return images[indices]


def _colored_rows(images: np.ndarray, colors: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """[n, 28, 28, 3] uint8: the images of the indices, each in the channel of its colour."""
    rgb = np.zeros((len(indices), *images.shape[1:], 3), np.uint8)
    rgb[np.arange(len(indices)), ..., colors[indices]] = images[indices]
    return rgb


def _load_colored(load_many: Callable[[np.ndarray], np.ndarray], index: int) -> Image.Image:
    return Image.fromarray(load_many(np.array([index]))[0])


def _is_angle(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and str(int(name)) == name
