"""Where a data set is built: a hidden folder beside its final place, on the same disk, one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gsdg.errors import DISK_FULL, UserError

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)


class Unusable(UserError):
    """This archive, folder or address does not serve; another source may."""


class Damaged(Unusable):
    """`path` is not a whole file of the kind that it should be."""

    def __init__(self, path: Path, kind: str, why: object) -> None:
        super().__init__(
            f"{path} ({path.stat().st_size:,} bytes) is not a whole {kind}: {why}. "
            "It is another file, damaged or cut short: get it again."
        )
        self.path = path


@contextmanager
def workplace(final: Path) -> Iterator[Path]:
    """An empty folder `.<name>.building` beside `final`, gone at the end; a killed process's is emptied first."""
    building = final.with_name(f".{final.name}.building")
    with _locked(final.with_name(f".{final.name}.lock"), final):
        try:
            remove(building)
            building.mkdir()
            yield building
        except OSError as error:
            if explained := _explained(error, final):
                raise explained from error
            raise
        finally:
            shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _locked(path: Path, final: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which is gone at the end. UserError: another process holds it."""
    descriptor = _lock(path, final)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go: it is nobody else's yet
        os.close(descriptor)


def _lock(path: Path, final: Path) -> int:
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"another process is preparing {final}. Wait until it is done.") from error
    os.close(descriptor)
    return _lock(path, final)  # its holder was done, and removed it, since we opened it


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise UserError(
            f"cannot write in {path.parent}: {error.strerror}. Set data_dir=... to a folder that you may write in."
        ) from error


def _explained(error: OSError, final: Path) -> UserError | None:
    """What the disk refuses, as a message; None for anything else, which is a bug."""
    if error.errno in DISK_FULL:
        return UserError(
            f"no space left for {final}: {mega(free(final.parent))} MB are free. "
            "Free some, or set data_dir=... to another disk. Nothing was put in place."
        )
    if error.errno in REFUSED:
        return UserError(f"{error.filename or final}: {error.strerror}. Nothing was put in place.")
    return None


def check_space(folder: Path, needed: int, what: str) -> None:
    """UserError where `needed` bytes do not fit on the disk of `folder`."""
    if needed > free(folder):
        raise UserError(
            f"no space for {what}: it takes {mega(needed)} MB, and {mega(free(folder))} MB are free on the disk of "
            f"{folder}. Free some, or set data_dir=... to another disk."
        )


def free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def mega(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def remove(folder: Path) -> None:
    """A folder and all below it, if it is there."""
    if folder.is_dir():
        shutil.rmtree(folder)
