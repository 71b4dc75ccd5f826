"""RotatedMNIST and ColoredMNIST from MNIST's four files, image for image as DomainBed builds them.

Sources: DomainBed's datasets.py (https://arxiv.org/abs/2007.01434); LeCun, Cortes and Burges' MNIST, whose IDX files
lie where torchvision's download puts them: <data_dir>/MNIST/raw/train-images-idx3-ubyte and so on, not compressed.
Training and test images are one pool of 70,000, in this order. DomainBed draws from torch's global generator right
after `torch.manual_seed(args.seed)`; here the same draws come from a generator of their own, with the same seed.
Deviation: `dataset.seed` (0, the default of DomainBed's --seed) stays fixed between the trials of an experiment;
DomainBed's sweep gives every job another --seed, and so deals out its MNISTs anew each time.
"""

from __future__ import annotations

import math
import shlex
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gsdg.data.digits import SIZE, Colored, Digits, Rotated
from gsdg.errors import UserError, listing

FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


class Mnist(Digits):
    """The pool on disk. `root` is relative to `data_dir`, or absolute; the files are in its folder `raw`."""

    def __init__(self, *, name: str, root: str, domains: Sequence[str], seed: int = 0, data_dir: str) -> None:
        super().__init__(name=name, domains=domains, seed=seed)
        self.data_dir = Path(data_dir).expanduser().absolute()
        self.root = self.data_dir / Path(root).expanduser()

    @property
    def _raw(self) -> Path:
        return self.root / "raw"

    @property
    def _prepare(self) -> str:
        return f"python -m gsdg.data prepare {self.name} {shlex.quote(f'data_dir={self.data_dir}')}"

    def check_present(self) -> None:
        """UserError unless the four files are there; they are not read."""
        if missing := [name for name in FILES if not (self._raw / name).is_file()]:
            raise UserError(
                f"{self.name}: no {listing(missing)} in {self._raw}. Set data_dir=... to the folder that holds "
                f"{self.root.name}/raw, or dataset.root=... to the folder that holds raw, or get the files: "
                f"{self._prepare}"
            )

    def _pool(self) -> tuple[np.ndarray, np.ndarray]:
        self.check_present()
        try:
            parts = [_read_part(*(self._raw / name for name in pair)) for pair in (FILES[:2], FILES[2:])]
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.name}: {error}. Remove what is damaged and get it again: {self._prepare}"
            ) from error
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return images, labels.astype(np.int64)


class RotatedMNIST(Mnist, Rotated):
    """MNIST, turned."""


class ColoredMNIST(Mnist, Colored):
    """MNIST, coloured. 28 x 28: DomainBed does not subsample it, where the IRM paper did."""


def _read_part(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """([N, 28, 28], [N]) uint8. ValueError names the file that is not right."""
    pixels, digits = read_idx(images, (SIZE, SIZE)), read_idx(labels, ())
    if len(pixels) != len(digits):
        raise ValueError(f"{images} holds {len(pixels)} images, but {labels} {len(digits)} labels")
    if digits.max() > 9:
        raise ValueError(f"{labels} holds a label {digits.max()}, which is no digit")
    return pixels, digits


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """[N, *shape] uint8 of an IDX file: 0, 0, 8 (bytes), how many axes; their lengths, big-endian; the values."""
    data, axes = path.read_bytes(), 1 + len(shape)
    header = 4 + 4 * axes
    if len(data) < header or data[:4] != bytes([0, 0, 8, axes]):
        raise ValueError(f"{path} ({len(data)} bytes) does not begin as an IDX file of bytes with {axes} axes")
    lengths = struct.unpack_from(f">{axes}I", data, 4)
    wanted = header + math.prod(lengths)
    if lengths[1:] != shape or not lengths[0] or len(data) != wanted:
        announced = " x ".join(map(str, lengths))
        raise ValueError(
            f"{path} has {len(data)} bytes; its header says {announced}, which takes {wanted}"
            + (f", and {' x '.join(map(str, ('N', *shape)))} is wanted" if lengths[1:] != shape else "")
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(lengths)
