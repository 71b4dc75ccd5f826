"""Decode once: a domain's images as one memory map of uint8 RGB pixels, shared read-only by every run that needs it.

An image whose shorter side is above `short_side` is stored shrunk to it (Pillow's bilinear filter), aspect kept: a crop
of it is then resized a second time, so a little blurred against the exact mode; smaller images are stored as decoded.
What lies on disk is in `cache_build`; here is who finds it, who builds it, and who waits.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from gsdg.data.cache_build import NoRoom, build, content, inspected, key, placed, shrunk, starts, whole
from gsdg.data.domains import Domain, DomainDataset
from gsdg.errors import UserError
from gsdg.runs import read_json, write_json

log = logging.getLogger(__name__)
SAMPLES = 16  # files of a domain that are read at every start
WAIT, SAY_SO = 0.5, 30.0  # seconds between looks at another process's lock, and between lines about it


class Cache:
    """`auto`: beside the data, or in ~/.cache/gsdg where that cannot be written, or none at all; `off`; or a folder."""

    def __init__(self, where: str, *, beside: Path, short_side: int) -> None:
        if short_side < 1:
            raise UserError(f"dataset.short_side={short_side}. Valid: 1 pixel or more; 256 suits models of 224.")
        if not where:
            raise UserError("dataset.cache is empty. Valid: auto, off, or a folder.")
        self.off, self.auto = where == "off", where == "auto"
        self.folders = _candidates(beside) if self.auto else [Path(where).expanduser().absolute()]
        self.short_side = short_side

    def open(self, domain: Domain) -> Domain:
        """The domain with arrays [h, w, 3] uint8 for images, decoded now if they never were.

        UserError: see NoRoom, and images that cannot be read.
        """
        if self.off:
            return decoded(domain, self.short_side)
        try:
            stored = Stored(self.folder(domain))
        except NoRoom as error:
            if not self.auto:
                raise
            log.warning("%s Going on without a cache: every image is decoded at every draw.", error)
            return decoded(domain, self.short_side)
        return Domain(domain.name, domain.labels, stored)

    def find(self, domain: Domain) -> Path | None:
        """The folder of the domain's pixels, if they were decoded before; nothing is decoded now."""
        return None if self.off else self._find(fingerprint(domain.files))

    def _find(self, seen: str) -> Path | None:
        found = (_known(root, seen, self.short_side) for root in self.folders)
        return next((folder for folder in found if folder), None)

    def folder(self, domain: Domain) -> Path:
        """Where the domain's pixels are; they are there when this returns. Raises as `open`, and NoRoom."""
        seen = fingerprint(domain.files)
        if found := self._find(seen):
            return found
        root = _writable(self.folders)
        with sole(root / f".{seen}.lock") as alone:
            return _known(root, seen, self.short_side) or self._built(domain, root, seen, alone)

    def _built(self, domain: Domain, root: Path, seen: str, alone: bool) -> Path:
        for leftover in root.glob(f".{seen}.*.building") if alone else ():  # of a builder that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        files = inspected(domain)
        folder = root / key(content(files), self.short_side)
        with sole(root / f".{folder.name}.lock"):  # the same images lie elsewhere too, and may be decoded from there
            if not whole(folder):
                build(domain, files, folder, root / f".{seen}.{uuid.uuid4().hex}.building", self.short_side)
        with suppress(OSError):  # without it the next start only reads the files again
            write_json(root / "seen" / f"{seen}.json", {"content": content(files), "images": len(files)})
        return folder


def as_arrays(dataset: DomainDataset, cache: Cache | None) -> DomainDataset:
    """The data set with arrays [h, w, 3] uint8 for images; cache: None where they are in memory as it is."""
    domains = {name: cache.open(domain) if cache else decoded(domain, None) for name, domain in dataset.domains.items()}
    return DomainDataset(dataset.name, dataset.classes, domains)


def in_memory(dataset: DomainDataset) -> bool:
    return all(domain.files is None for domain in dataset.domains.values())


def decoded(domain: Domain, short_side: int | None) -> Domain:
    """The domain with arrays for images, each made when it is asked for."""
    load = partial(_as_array, domain.load, short_side)
    return Domain(domain.name, domain.labels, load, domain.files)


def _as_array(load: Callable[[int], Image.Image], short_side: int | None, index: int) -> np.ndarray:
    return shrunk(load(index).convert("RGB"), short_side)


class Stored:
    """index -> [h, w, 3] uint8, a read-only view of the memory map. Pickled as its folder's name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes = np.load(folder / "shapes.npy")
        self.starts = starts(self.shapes)
        self.pixels = np.asarray(np.memmap(folder / "pixels.bin", np.uint8, "r"))

    def __call__(self, index: int) -> np.ndarray:
        return placed(self.pixels, self.shapes, self.starts, index)

    def __reduce__(self) -> tuple:
        return Stored, (self.folder,)


def fingerprint(paths: Sequence[str]) -> str:
    """Of the files' names below their common folder, their sizes and times, and the bytes of a few of them.

    Cheap, and the same in a copy that keeps times. The bytes tell apart what an archive unpacks with one time for all
    files, where images that are not compressed have one size as well.
    """
    top = os.path.commonpath([os.path.dirname(path) for path in paths])
    digest = hashlib.sha256()
    try:
        for path in paths:
            status = os.stat(path)
            digest.update(f"{os.path.relpath(path, top)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        for path in paths[:: -(-len(paths) // SAMPLES)]:
            digest.update(Path(path).read_bytes())
    except OSError as error:
        where = error.filename or top
        raise UserError(f"cannot read {where} ({error.strerror}). Is the data set still being copied?") from error
    return digest.hexdigest()[:24]


def _known(root: Path, seen: str, short_side: int) -> Path | None:
    """The finished folder for files that were read before, if it is there and whole."""
    bytes_seen = read_json(root / "seen" / f"{seen}.json").get("content")
    folder = root / key(bytes_seen, short_side) if bytes_seen else None
    return folder if folder and whole(folder) else None


def _candidates(beside: Path) -> list[Path]:
    """Beside the data set; then at home, where the user has one: in a container he may not."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return [beside.parent / ".gsdg_cache", *([home / "gsdg"] if home.is_absolute() else [])]


def _writable(folders: Sequence[Path]) -> Path:
    """The first of the folders that can be made and written; NoRoom where none can."""
    reasons = []
    for folder in folders:
        try:
            for place in (folder, folder / "seen"):
                place.mkdir(parents=True, exist_ok=True)
                probe = place / f".{uuid.uuid4().hex}"
                probe.touch()
                probe.unlink()
            return folder
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
    raise NoRoom(
        f"no cache can be written ({'; '.join(reasons)}). Set dataset.cache to a folder that can, or dataset.cache=off."
    )


@contextmanager
def sole(path: Path) -> Iterator[bool]:
    """Wait for, then hold, the lock file; the system lets go of it when the process dies, however it dies.

    Yields False where nothing can be locked: then jobs that start together may each decode the images, and only the
    finished folder's name is shared.
    """
    try:
        file = path.open("ab+", buffering=0)
    except OSError as error:
        log.warning("%s cannot be opened (%s): it is not waited for", path, error.strerror)
        yield False
        return
    with file:
        alone = _wait_for(file)
        with suppress(OSError):  # of a full disk: only what the others say of this process is lost
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield alone


def _wait_for(file: BinaryIO) -> bool:
    said = -SAY_SO
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() - said > SAY_SO:
                said = time.monotonic()
                other = Path(file.name).read_text() or "a process"
                log.info("waiting for %s, which is decoding the same images", other)
            time.sleep(WAIT)
        except OSError as error:
            log.warning("%s cannot be locked (%s)", file.name, error.strerror)
            return False
