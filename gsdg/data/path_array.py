"""Many paths as one array of bytes: about 50 bytes per path, where a list of Python strings takes about 120."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

BLOCK = 4096  # paths whose offsets are Python numbers at a time


class PathArray(Sequence[str]):
    """A read-only sequence of absolute paths, each made when it is asked for.

    Args:
        text: [bytes] uint8, the paths one after another in UTF-8, relative to `folder` or absolute.
        offsets: [M + 1] int64, where each path begins in `text`, and the number of bytes.
        folder: an absolute path.
        rows: [N] the numbers of the paths in this sequence, 0 <= number < M.
    """

    def __init__(self, text: np.ndarray, offsets: np.ndarray, folder: str, rows: np.ndarray) -> None:
        self.text, self.offsets, self.folder, self.rows = text, offsets, folder, rows

    @classmethod
    def of(cls, paths: Sequence[str], folder: str) -> PathArray:
        """These paths as an array of bytes."""
        encoded = [path.encode() for path in paths]
        text = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(
            text, _offsets([np.fromiter(map(len, encoded), np.int64, len(encoded))]), folder, np.arange(len(paths))
        )

    @classmethod
    def joined(cls, arrays: Sequence[PathArray]) -> PathArray:
        """The paths of all arrays, each made by `of` with the same folder; at least one."""
        offsets = _offsets([np.diff(array.offsets) for array in arrays])
        text = np.concatenate([array.text for array in arrays])
        return cls(text, offsets, arrays[0].folder, np.arange(len(offsets) - 1))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> PathArray: ...
    def __getitem__(self, index: int | slice) -> str | PathArray:
        if isinstance(index, slice):
            return self.take(self.rows[index])
        return os.path.join(self.folder, self.as_listed(index))

    def __iter__(self) -> Iterator[str]:
        inside = os.path.join(self.folder, "")
        return (path if os.path.isabs(path) else inside + path for path in self.all_as_listed())

    def all_as_listed(self) -> Iterator[str]:
        """All paths as they were given; several times faster than one by one."""
        text = memoryview(self.text.data)
        for start in range(0, len(self.rows), BLOCK):
            rows = self.rows[start : start + BLOCK]
            for begin, end in zip(self.offsets[rows].tolist(), self.offsets[rows + 1].tolist(), strict=True):
                yield str(text[begin:end], "utf-8")

    def as_listed(self, index: int) -> str:
        """The path as it was given, relative to `folder` or absolute."""
        row = self.rows[index]
        return self.text[self.offsets[row] : self.offsets[row + 1]].tobytes().decode()

    def take(self, rows: np.ndarray) -> PathArray:
        """The paths of these rows. The bytes are shared, not copied."""
        return PathArray(self.text, self.offsets, self.folder, rows)


def _offsets(lengths: Sequence[np.ndarray]) -> np.ndarray:
    """[M + 1] int64: where each path begins, and the number of bytes. lengths: of the paths, in pieces."""
    return np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
