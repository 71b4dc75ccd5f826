"""RotatedMNIST and ColoredMNIST from MNIST's four files, with exactly the images of DomainBed's versions.

Sources: DomainBed's datasets.py (https://arxiv.org/abs/2007.01434); LeCun, Cortes and Burges' MNIST, whose uncompressed
IDX files lie where torchvision's download puts them: <data_dir>/MNIST/raw/train-images-idx3-ubyte and so on. Training
and test images are one pool of 70,000, in this order. DomainBed draws from torch's global generator right after
`torch.manual_seed(args.seed)`; here a separate generator with the same seed makes the same draws.

Deviation: `dataset.seed` (0, the default of DomainBed's --seed) is the same in all trials of an experiment. DomainBed's
sweep gives every job another --seed and so distributes the digits over the domains differently in each job.
"""

from __future__ import annotations

import math
import shlex
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gsdg.data.digits import SIZE, Colored, Digits, Rotated
from gsdg.utils.errors import UserError, listing

FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


class Mnist(Digits):
    """The pool of MNIST's training and test images on disk.

    Args:
        name: name of the dataset.
        root: the folder that contains MNIST's folder `raw`, absolute or relative to `data_dir`.
        domains: names of the domains, see the subclasses; at least one, each once.
        seed: determines all random draws, 0 <= seed < 2**32; 0 as in DomainBed.
        data_dir: the folder of all datasets.
    """

    def __init__(self, *, name: str, root: str, domains: Sequence[str | int], seed: int = 0, data_dir: str) -> None:
        super().__init__(name=name, domains=domains, seed=seed)
        self.data_dir = Path(data_dir).expanduser().absolute()
        self.root = self.data_dir / Path(root).expanduser()

    @property
    def _raw(self) -> Path:
        return self.root / "raw"

    @property
    def _prepare_command(self) -> str:
        return f"python -m gsdg.data prepare {self.name} {shlex.quote(f'data_dir={self.data_dir}')}"

    def check_present(self) -> None:
        """UserError if one of the four files is missing; the files are not read."""
        if missing := [name for name in FILES if not (self._raw / name).is_file()]:
            raise UserError(
                f"{self.name}: no {listing(missing)} in {self._raw}. Set data_dir=... to the folder that holds "
                f"{self.root.name}/raw, or dataset.root=... to the folder that holds raw, or get the files: "
                f"{self._prepare_command}"
            )

    def _pool(self) -> tuple[np.ndarray, np.ndarray]:
        self.check_present()
        try:
            parts = [_read_part(*(self._raw / name for name in pair)) for pair in (FILES[:2], FILES[2:])]
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.name}: {error}. Remove the damaged file and get it again: {self._prepare_command}"
            ) from error
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return images, labels.astype(np.int64)


class RotatedMNIST(Mnist, Rotated):
    """MNIST, rotated: 10 classes.

    Args:
        name: name of the dataset.
        root: the folder that contains MNIST's folder `raw`, absolute or relative to `data_dir`.
        domains: angles in whole degrees, counterclockwise, such as "15"; at least one, each once.
        seed: determines which digit is in which domain, 0 <= seed < 2**32; 0 as in DomainBed.
        data_dir: the folder of all datasets.
    """


class ColoredMNIST(Mnist, Colored):
    """MNIST, coloured red or green: 2 classes, see `digits.Colored`.

    Images are 28 x 28: DomainBed does not subsample them, unlike the IRM paper.

    Args:
        name: name of the dataset.
        root: the folder that contains MNIST's folder `raw`, absolute or relative to `data_dir`.
        domains: correlations of colour and label, a sign and whole percents such as "+90%"; at least one, each once.
        seed: determines which digit is in which domain, the label noise and the colours, 0 <= seed < 2**32; 0 as in
            DomainBed.
        data_dir: the folder of all datasets.
    """


def _read_part(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the training or the test images: ([N, 28, 28], [N]) uint8. ValueError names the file that is invalid."""
    pixels, digits = read_idx(images, (SIZE, SIZE)), read_idx(labels, ())
    if len(pixels) != len(digits):
        raise ValueError(f"{images} holds {len(pixels)} images, but {labels} {len(digits)} labels")
    if digits.max() > 9:
        raise ValueError(f"{labels} holds a label {digits.max()}, which is not a digit")
    return pixels, digits


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read an IDX file of unsigned bytes: [N, *shape] uint8.

    The format: the bytes 0, 0, 8 (the type code of unsigned bytes) and the number of axes; the length of each axis,
    uint32 big-endian; the values.

    Args:
        shape: the expected lengths of all axes but the first.

    Raises:
        ValueError: another type or shape, or the file is longer or shorter than its header says.
    """
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
