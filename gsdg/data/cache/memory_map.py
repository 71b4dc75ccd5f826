"""Decode each image once: a domain's images as one memory map of uint8 RGB pixels, shared by all runs that need it.

An image whose shorter side exceeds `short_side` is resized to it before it is stored (Pillow's bilinear filter, aspect
ratio kept). A crop of such an image is then resized a second time and slightly blurrier than in the exact mode. Smaller
images are stored as decoded.

This module finds the decoded images of a domain, or builds them while other processes wait. `cache_build` documents the
files on disk and writes them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from gsdg.data.cache.builder import (
    CacheUnavailable,
    build,
    cache_key,
    content_digest,
    image_offsets,
    image_view,
    inspect_images,
    is_complete,
    resize_short_side,
)
from gsdg.data.dataset import Domain, DomainDataset
from gsdg.data.image_io import as_rgb
from gsdg.utils.errors import UserError
from gsdg.utils.file_locks import lock_open_file
from gsdg.utils.json_files import read_json, write_json

log = logging.getLogger(__name__)
BESIDE = ".gsdg_cache"  # name of the cache folder that lies next to the dataset's folder
MOST_COPIES = 16  # copies of the same files that one note can remember
SAMPLES = 16  # files per domain whose bytes are read at every start
WAIT, LOG_EVERY = 0.5, 30.0  # seconds between attempts to lock, and between log lines while waiting


class Cache:
    """The folders in which decoded images are looked up and stored.

    Args:
        where: "auto": next to the dataset, or in ~/.cache/gsdg if that is not writable, or no cache if neither is;
            "off": no cache, every image is decoded whenever it is drawn; otherwise the path of a folder.
        beside: the dataset's folder.
        short_side: images are stored with a shorter side of at most this many pixels, >= 1.
    """

    def __init__(self, where: str, *, beside: Path, short_side: int) -> None:
        if short_side < 1:
            raise UserError(f"dataset.short_side={short_side}. Valid: 1 pixel or more; 256 suits models of 224.")
        if not where:
            raise UserError("dataset.cache is empty. Valid: auto, off, or a folder.")
        self.off, self.auto = where == "off", where == "auto"
        self.folders = _default_folders(beside) if self.auto else [Path(where).expanduser().absolute()]
        self.short_side = short_side

    def open(self, domain: Domain) -> Domain:
        """The domain with images as arrays [h, w, 3] uint8; they are decoded now if no cache folder has them.

        UserError: an image cannot be read. CacheUnavailable: the given folder cannot be used.
        """
        if self.off:
            return decoded(domain, self.short_side)
        try:
            stored = StoredImages(self.folder(domain))
        except CacheUnavailable as error:
            if not self.auto:
                raise
            log.warning("%s Continuing without a cache: every image is decoded whenever it is drawn.", error)
            return decoded(domain, self.short_side)
        return replace(domain, load=stored, load_many=None)

    def find(self, domain: Domain) -> Path | None:
        """The folder of the domain's decoded images, or None if they have not been decoded yet."""
        return None if self.off else self._find(fingerprint_files(domain.paths))

    def _find(self, fingerprint: Fingerprint) -> Path | None:
        """The complete folder for files that were read before and have not changed since."""
        notes = [read_json(root / "seen" / f"{fingerprint.name}.json") for root in self.folders]
        contents = [note["content"] for note in notes if fingerprint.changes in note.get("changes", ())]
        return next((folder for content in contents if (folder := self._complete_folder(content))), None)

    def _complete_folder(self, content: str) -> Path | None:
        """The complete folder with the decoded images of files with this content digest."""
        folders = (root / cache_key(content, self.short_side) for root in self.folders)
        return next((folder for folder in folders if is_complete(folder)), None)

    def folder(self, domain: Domain) -> Path:
        """The folder of the domain's decoded images; builds it if needed.

        UserError: an image cannot be read. CacheUnavailable: no cache folder is writable, or the disk is full.
        """
        fingerprint = fingerprint_files(domain.paths)
        if folder := self._find(fingerprint):
            return folder
        try:
            root = _first_writable(self.folders)
        except CacheUnavailable:
            if folder := self._find_by_content(domain, fingerprint):
                return folder
            raise
        with exclusive_lock(root / f".{fingerprint.name}.lock") as locked:
            # Another process may have built the folder while this one waited for the lock.
            return self._find(fingerprint) or self._build(domain, root, fingerprint, locked)

    def _find_by_content(self, domain: Domain, fingerprint: Fingerprint) -> Path | None:
        """For a read-only cache, which cannot note that these files are a copy of known ones.

        If files with the same names, sizes and times were seen before, read the files to find out whether their content
        is the same too.
        """
        seen_before = any((root / "seen" / f"{fingerprint.name}.json").exists() for root in self.folders)
        return self._complete_folder(content_digest(inspect_images(domain))) if seen_before else None

    def _build(self, domain: Domain, root: Path, fingerprint: Fingerprint, locked: bool) -> Path:
        """Read all files, decode them unless a folder for their content exists, and note their fingerprint."""
        # Under the lock no other process builds from these files: what is left over is from a process that was killed.
        for leftover in root.glob(f".{fingerprint.name}.*.building") if locked else ():
            shutil.rmtree(leftover, ignore_errors=True)
        files = inspect_images(domain)
        content = content_digest(files)
        folder = self._complete_folder(content) or root / cache_key(content, self.short_side)
        # A second lock, by content: another process may be decoding a copy of the same images.
        with exclusive_lock(root / f".{folder.name}.lock"):
            if not is_complete(folder):
                part = root / f".{fingerprint.name}.{uuid.uuid4().hex}.building"
                build(domain, files, folder, part, self.short_side)
        with suppress(OSError):  # without the note, the next start reads the files again but need not decode them
            _write_note(root / "seen" / f"{fingerprint.name}.json", domain, content, fingerprint)
        return folder


def as_arrays(dataset: DomainDataset, cache: Cache | None) -> DomainDataset:
    """The dataset with images as arrays [h, w, 3] uint8. cache: None for a dataset whose images are in memory."""
    domains = {name: cache.open(domain) if cache else decoded(domain, None) for name, domain in dataset.domains.items()}
    return DomainDataset(dataset.name, dataset.classes, domains)


def in_memory(dataset: DomainDataset) -> bool:
    """Whether no image of the dataset is decoded when it is loaded: they are in memory, or in a memory map."""
    return all(domain.files is None or isinstance(domain.load, StoredImages) for domain in dataset.domains.values())


def decoded(domain: Domain, short_side: int | None) -> Domain:
    """The domain with images as arrays [h, w, 3] uint8, decoded on every access, without a cache."""
    load = partial(_load_array, domain.load, short_side)
    return replace(domain, load=load, load_many=None)


def _load_array(load: Callable[[int], Image.Image | np.ndarray], short_side: int | None, index: int) -> np.ndarray:
    return resize_short_side(as_rgb(load(index)), short_side)


class StoredImages:
    """Callable: index -> [h, w, 3] uint8, a read-only view of the memory map. Pickled as the path of its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes = np.load(folder / "shapes.npy")
        self.offsets = image_offsets(self.shapes)
        self.pixels = np.asarray(np.memmap(folder / "pixels.bin", np.uint8, "r"))

    def __call__(self, index: int) -> np.ndarray:
        return image_view(self.pixels, self.shapes, self.offsets, index)

    def __reduce__(self) -> tuple:
        return StoredImages, (self.folder,)


class Fingerprint(NamedTuple):
    """Identifies the files of a domain without reading all of them.

    name: digest of the file names relative to their common folder, sizes and modification times, and of the bytes of
        SAMPLES files. A copy that preserves times has the same name. The sampled bytes are needed because some archives
        unpack with one time for all files, and uncompressed images of equal dimensions have equal sizes.
    changes: digest of the files' change times (ctime), which a program cannot set. Files with a known name but unknown
        changes are read again, but not decoded again if their content is the same.
    """

    name: str
    changes: str


def fingerprint_files(paths: Sequence[str]) -> Fingerprint:
    """Compute the fingerprint of a domain's files. UserError: a file cannot be read."""
    top = common_folder(paths)
    digest, changes = hashlib.sha256(), hashlib.sha256()
    try:
        for path in paths:
            status = os.stat(path)
            changes.update(f"{status.st_ctime_ns}\n".encode())
            name = os.fsencode(os.path.relpath(path, top))
            digest.update(name + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        for path in paths[:: -(-len(paths) // SAMPLES)]:
            digest.update(Path(path).read_bytes())
    except OSError as error:
        where = error.filename or top
        raise UserError(f"cannot read {where} ({error.strerror}). Is the data set still being copied?") from error
    return Fingerprint(digest.hexdigest()[:24], changes.hexdigest()[:24])


def common_folder(paths: Sequence[str]) -> str:
    """The deepest folder that contains all of the files."""
    return os.path.commonpath(sorted({os.path.dirname(path) for path in paths}))


def _write_note(path: Path, domain: Domain, content: str, fingerprint: Fingerprint) -> None:
    """Record the content of files with this fingerprint. Copies of the files, with other changes, share the note."""
    before = read_json(path)
    changes = before.get("changes", []) if before.get("content") == content else []
    changes = [other for other in changes if other != fingerprint.changes][-MOST_COPIES:] + [fingerprint.changes]
    source = {"domain": domain.name, "folder": common_folder(domain.paths)}
    write_json(path, {"content": content, "images": len(domain), **source, "changes": changes})


def _default_folders(beside: Path) -> list[Path]:
    """Next to the dataset; then in the home directory, which a container may not have."""
    return [folder for folder in (beside.parent / BESIDE, home_cache()) if folder]


def home_cache() -> Path | None:
    """gsdg's folder in the user's cache directory, or None if there is no home directory."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return home / "gsdg" if home.is_absolute() else None


def _first_writable(folders: Sequence[Path]) -> Path:
    """The first folder that exists or can be created, and is writable. CacheUnavailable: there is none."""
    reasons = []
    for root in folders:
        try:
            for folder in (root, root / "seen"):
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".{uuid.uuid4().hex}"
                probe.touch()
                probe.unlink()
            return root
        except OSError as error:
            reasons.append(f"{root}: {error.strerror}")
    raise CacheUnavailable(
        f"no cache can be written ({'; '.join(reasons)}). Set dataset.cache to a writable folder, or dataset.cache=off."
    )


@contextmanager
def exclusive_lock(path: Path) -> Generator[bool]:
    """Wait for the lock on the file `path`, then hold it. The system releases it when the process ends in any way.

    Yields False if the file cannot be locked. Then processes that start together may each decode the same images; only
    the final rename of the complete folder is shared.
    """
    try:
        file = path.open("ab+", buffering=0)
    except OSError as error:
        log.warning("%s cannot be opened (%s): not waiting for other processes", path, error.strerror)
        yield False
        return
    with file:
        locked = _wait_for(file)
        with suppress(OSError):  # on a full disk, other processes only lack the name of this one in their log line
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield locked


def _wait_for(file: BinaryIO) -> bool:
    """Wait until the file is locked, logging every LOG_EVERY seconds. False: it cannot be locked."""
    logged = -LOG_EVERY
    while True:
        try:
            lock_open_file(file, wait=False)
            return True
        except BlockingIOError:
            if time.monotonic() - logged > LOG_EVERY:
                logged = time.monotonic()
                other = Path(file.name).read_text() or "a process"
                log.info("waiting for %s, which is decoding the same images", other)
            time.sleep(WAIT)
        except OSError as error:
            log.warning("%s cannot be locked (%s)", file.name, error.strerror)
            return False
