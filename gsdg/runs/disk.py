"""What the disk refuses a run, as a message: no space, no permission, a failing disk. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from gsdg.utils.errors import DISK_FULL, UserError

DISK_FAILS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)  # not caused by the user


class NotWritten(UserError, OSError):
    """A file of a run cannot be written. It is also an OSError, for callers that can continue without the file."""


@contextlib.contextmanager
def os_errors_named(path: Path, advice: str = "") -> Generator[None]:
    """Turn an OSError inside into NotWritten, with the name of the file that failed.

    Args:
        path: the file or folder to name if the OSError names none.
        advice: what the user should do; by default the usual advice for this kind of error.
    """
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        raise not_written(Path(error.filename or path), error, advice) from error


def not_written(path: Path, error: OSError, advice: str = "") -> NotWritten:
    """`could not write FILE: No space left on device (0.2 MB free there).`, followed by the advice, as an exception."""
    space = f" ({free_megabytes(path):,.1f} MB free there)" if error.errno in DISK_FULL else ""
    verb = "read or write" if error.errno in DISK_FAILS else "write"
    message = f"could not {verb} {path}: {error.strerror or error}{space}.\n{advice or usual_advice(error)}"
    not_written_error = NotWritten(message)
    not_written_error.errno = error.errno
    return not_written_error


def usual_advice(error: OSError) -> str:
    if error.errno in DISK_FULL:
        return "Free some space and run the same command again: the run resumes from its last checkpoint."
    if error.errno in DISK_FAILS:
        return (
            "The disk or the network file system fails. Once it works, run the same command again: the run resumes "
            "from its last checkpoint."
        )
    return "Make that place writable, or choose another one: runs_dir=FOLDER."


def free_megabytes(path: Path) -> float:
    """Free space on the disk of `path`, which need not exist yet; nan where the system does not report it."""
    existing = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    try:
        return shutil.disk_usage(existing).free / 1e6
    except OSError:
        return float("nan")
