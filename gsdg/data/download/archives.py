"""Unpacking zip, tar and tar.gz archives, recognized by content. Nothing is ever written outside the given folder.

All members are checked before the first one is written. An archive is refused if it contains an absolute path, `..`, a
link or a device, or needs more bytes than the disk has free.
"""

from __future__ import annotations

import gzip
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from gsdg.data.download.disk import Damaged, check_space
from gsdg.utils.errors import UserError
from gsdg.utils.progress import Progress

EXPECTED = "zip, tar or tar.gz archive"
TarMode = Literal["r:gz", "r:"]  # tarfile's, with and without compression
MOST_MEMBERS = 5_000_000  # eight times the files of DomainNet
# What zipfile and tarfile raise for files that are truncated, damaged, encrypted or inconsistent.
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
    """One entry of an archive: `kind` is "file", "folder", "link" or "device"; `open()` returns a file's content."""

    name: str
    size: int
    kind: str
    open: Callable[[], IO[bytes]]


def is_archive(path: Path) -> bool:
    """Whether the file is a zip, tar or tar.gz archive, by its content."""
    return path.is_file() and _format(path) is not None


def unpack(path: Path, folder: Path) -> None:
    """Unpack all members into `folder`.

    Raises:
        Damaged: the archive cannot be read completely.
        UserError: the archive is not safe to unpack, or too large for the disk.
    """
    if (archive_format := _format(path)) is None:
        raise Damaged(path, EXPECTED, "it does not begin like any of them")
    try:
        with _zip(path) if archive_format == "zip" else _tar(path, archive_format) as members:
            _check(path, members, folder)
            with Progress(f"unpacking {path.name}", len(members), "files") as progress:
                for member in members:
                    _write(member, folder)
                    progress.add(1)
    except DAMAGED as error:
        raise Damaged(path, EXPECTED, str(error) or type(error).__name__) from error


def _format(path: Path) -> Literal["zip"] | TarMode | None:
    """The format of an archive: "zip", or tarfile's mode; None if the file is not an archive.

    A zip is recognized by its first bytes, because a truncated zip lacks the directory at its end, by which zipfile
    recognizes it, and must be reported as damaged.
    """
    with open(path, "rb") as file:
        first_bytes = file.read(4)
    if first_bytes in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    mode: TarMode = "r:gz" if first_bytes[:2] == b"\x1f\x8b" else "r:"
    try:
        with tarfile.open(path, mode):
            return mode
    except DAMAGED:
        return None


@contextmanager
def _zip(path: Path) -> Generator[list[Member]]:
    with zipfile.ZipFile(path) as archive:
        yield [
            Member(info.filename, info.file_size, _zip_kind(info), lambda info=info: archive.open(info))
            for info in archive.infolist()
        ]


def _zip_kind(info: zipfile.ZipInfo) -> str:
    mode = stat.S_IFMT(info.external_attr >> 16)  # 0: the zip was written on a system without file modes
    if mode == stat.S_IFLNK:
        return "link"
    if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "device"
    return "folder" if info.is_dir() else "file"


@contextmanager
def _tar(path: Path, mode: TarMode) -> Generator[list[Member]]:
    with tarfile.open(path, mode) as archive:
        members = [Member(info.name, info.size, _tar_kind(info), partial(_content, archive, info)) for info in archive]
        _check_end(archive.fileobj.read)
        yield members


def _content(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    """The content of a member that is a file."""
    file = archive.extractfile(info)
    assert file, info.name
    return file


def _check_end(read: Callable[[int], bytes]) -> None:
    """Check that the archive really ends here: tarfile also stops at a damaged or truncated header.

    At its true end, a tar has blocks of zeros (of which tarfile has read the first), followed by gzip's checksum, which
    reading to the end of the file verifies.
    """
    n_bytes = 0
    while block := read(1 << 20):
        n_bytes += len(block)
        if block.strip(b"\0"):
            raise tarfile.ReadError("a broken header")
    if n_bytes < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("unexpected end")


def _tar_kind(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return "link"
    if info.isdir():
        return "folder"
    return "file" if info.isreg() else "device"


def _check(path: Path, members: list[Member], folder: Path) -> None:
    """UserError: a member is not safe to unpack, there are too many members, or the disk has too little space."""
    for member in members:
        if danger := _danger(member):
            raise UserError(
                f"{path}: member {member.name!r} is {danger}. No archive of a data set has that: not unpacked."
            )
    if len(members) > MOST_MEMBERS:
        raise UserError(f"{path} has {len(members):,} members, more than the {MOST_MEMBERS:,} any data set has.")
    folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, sum(member.size for member in members), f"what {path} unpacks to")


def _danger(member: Member) -> str | None:
    """Why the member could write outside the folder, or None."""
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
