"""The folder in which a dataset is built: hidden, next to the final folder, used by one process at a time."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from gsdg.utils.errors import DISK_FULL, UserError
from gsdg.utils.file_locks import lock_open_file

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)  # errors of the disk that are shown as a message


class Unusable(UserError):
    """The dataset cannot be built from this archive, folder or address; another source may work."""


class Damaged(Unusable):
    """A file is damaged, incomplete, or of another format.

    Args:
        path: the file.
        kind: the expected format, such as "gzip file".
        why: the error found.
    """

    def __init__(self, path: Path, kind: str, why: object) -> None:
        super().__init__(
            f"{path} ({path.stat().st_size:,} bytes) is not a complete {kind}: {why}. "
            "It is another file, damaged or truncated: get it again."
        )
        self.path = path


@contextmanager
def build_folder(final: Path) -> Generator[Path]:
    """Create an empty folder `.<name>.building` next to `final`, and remove it at the end.

    What a killed process has left in it is removed first. UserError: another process is using it, or an OSError inside
    says that the disk is full or not writable.
    """
    building = final.with_name(f".{final.name}.building")
    with _locked(final.with_name(f".{final.name}.lock"), final):
        try:
            remove(building)
            building.mkdir()
            yield building
        except OSError as error:
            if user_error := _as_user_error(error, final):
                raise user_error from error
            raise
        finally:
            shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _locked(path: Path, final: Path) -> Generator[None]:
    """Hold an exclusive lock on the file `path`; remove the file at the end. UserError: another process holds it."""
    descriptor = _lock(path, final)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is released: afterwards the file may be another process's lock
        os.close(descriptor)


def _lock(path: Path, final: Path) -> int:
    """Lock the file and return its descriptor."""
    descriptor = _open(path)
    try:
        lock_open_file(descriptor, wait=False)
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"another process is preparing {final}. Wait until it is done.") from error
    # The previous holder finished and removed the file after this process had opened it: lock a new one.
    os.close(descriptor)
    return _lock(path, final)


def _open(path: Path) -> int:
    """Open the lock file, creating it and its folder if needed. UserError: not writable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise UserError(
            f"cannot write in {path.parent}: {error.strerror}. Set data_dir=... to a folder that you may write in."
        ) from error


def _as_user_error(error: OSError, final: Path) -> UserError | None:
    """The message for a full or unwritable disk; None for other errors, which are bugs."""
    if error.errno in DISK_FULL:
        return UserError(
            f"no space left for {final}: {megabytes(free(final.parent))} MB are free. "
            "Free some, or set data_dir=... to another disk. Nothing was put in place."
        )
    if error.errno in REFUSED:
        return UserError(f"{error.filename or final}: {error.strerror}. Nothing was put in place.")
    return None


def check_space(folder: Path, needed: int, what: str) -> None:
    """UserError if `needed` bytes do not fit on the disk of `folder`; `what` names the files in the message."""
    if needed > free(folder):
        raise UserError(
            f"no space for {what}: it takes {megabytes(needed)} MB, and {megabytes(free(folder))} MB are free on the "
            f"disk of {folder}. Free some, or set data_dir=... to another disk."
        )


def free(folder: Path) -> int:
    """Free bytes on the disk of `folder`."""
    return shutil.disk_usage(folder).free


def megabytes(size: int) -> str:
    """A size in bytes as text in MB, without the unit."""
    return f"{size / 1e6:,.1f}"


def remove(folder: Path) -> None:
    """Remove a folder and everything below it, if it exists."""
    if folder.is_dir():
        shutil.rmtree(folder)
