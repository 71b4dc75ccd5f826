"""Unpacking zip, tar and tar.gz, told apart by content. Nothing is ever written outside the folder given.

All members are looked at before the first is written: an absolute path, `..`, a link, a device or more bytes than the
disk has free, and the archive is refused.
"""

from __future__ import annotations

import gzip
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from gsdg.data.prepare.disk import Damaged, check_space
from gsdg.data.progress import Progress
from gsdg.errors import UserError

EXPECTED = "zip, tar or tar.gz archive"
MOST_MEMBERS = 5_000_000  # eight times DomainNet
# What zipfile and tarfile raise on a file that is cut short, damaged, encrypted or contradicts itself.
DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    zlib.error,
    gzip.BadGzipFile,
    NotImplementedError,
    RuntimeError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
)


@dataclass(frozen=True)
class Member:
    """One entry: `kind` is file, folder, link or device; `open()` gives a file's bytes."""

    name: str
    size: int
    kind: str
    open: Callable[[], IO[bytes]]


def is_archive(path: Path) -> bool:
    return path.is_file() and _kind(path) is not None


def unpack(path: Path, folder: Path) -> None:
    """All members into `folder`. Damaged: it cannot be read to its end. UserError: it is not safe, or too large."""
    if (kind := _kind(path)) is None:
        raise Damaged(path, EXPECTED, "it begins as neither")
    try:
        with _zip(path) if kind == "zip" else _tar(path, kind) as members:
            _check(path, members, folder)
            with Progress(f"unpacking {path.name}", len(members), "files") as progress:
                for member in members:
                    _write(member, folder)
                    progress.add(1)
    except DAMAGED as error:
        raise Damaged(path, EXPECTED, str(error) or type(error).__name__) from error


def _kind(path: Path) -> str | None:
    """zip, or tarfile's mode. By the first bytes: a cut zip has lost the directory at its end, and is a zip still."""
    with open(path, "rb") as file:
        begin = file.read(4)
    if begin in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    mode = "r:gz" if begin[:2] == b"\x1f\x8b" else "r:"
    try:
        with tarfile.open(path, mode):
            return mode
    except DAMAGED:
        return None


@contextmanager
def _zip(path: Path) -> Iterator[list[Member]]:
    with zipfile.ZipFile(path) as archive:
        yield [
            Member(info.filename, info.file_size, _zip_kind(info), lambda info=info: archive.open(info))
            for info in archive.infolist()
        ]


def _zip_kind(info: zipfile.ZipInfo) -> str:
    mode = stat.S_IFMT(info.external_attr >> 16)  # 0: written where there are no modes
    if mode == stat.S_IFLNK:
        return "link"
    if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "device"
    return "folder" if info.is_dir() else "file"


@contextmanager
def _tar(path: Path, mode: str) -> Iterator[list[Member]]:
    with tarfile.open(path, mode) as archive:
        members = [
            Member(info.name, info.size, _tar_kind(info), lambda info=info: archive.extractfile(info))
            for info in archive
        ]
        _check_end(archive.fileobj)
        yield members


def _check_end(file: IO[bytes]) -> None:
    """tarfile takes a broken or cut header for the end; the true end is blocks of zeros, then gzip's checksum."""
    read = 0
    while block := file.read(1 << 20):
        read += len(block)
        if block.strip(b"\0"):
            raise tarfile.ReadError("a broken header")
    if read < tarfile.BLOCKSIZE:  # tarfile has read the first block
        raise tarfile.ReadError("unexpected end")


def _tar_kind(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return "link"
    if info.isdir():
        return "folder"
    return "file" if info.isreg() else "device"


def _check(path: Path, members: list[Member], folder: Path) -> None:
    for member in members:
        if why := _danger(member):
            raise UserError(
                f"{path}: member {member.name!r} is {why}. No archive of a data set has that: not unpacked."
            )
    if len(members) > MOST_MEMBERS:
        raise UserError(f"{path} has {len(members):,} members, more than the {MOST_MEMBERS:,} any data set has.")
    folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, sum(member.size for member in members), f"what {path} unpacks to")


def _danger(member: Member) -> str | None:
    name = member.name.replace("\\", "/")
    if name.startswith("/") or re.match(r"[A-Za-z]:/", name):
        return "an absolute path"
    if ".." in PurePosixPath(name).parts:
        return "a path out of its folder"
    return None if member.kind in ("file", "folder") else f"a {member.kind}"


def _write(member: Member, folder: Path) -> None:
    target = folder / member.name
    if member.kind == "folder":
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with member.open() as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
