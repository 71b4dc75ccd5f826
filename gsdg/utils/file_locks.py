"""Exclusive locks on files (flock), between the processes that use one file system. Standard library only.

A lock ends with the process that holds it, however the process ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Generator
from pathlib import Path
from typing import IO

NO_FILE_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of a file system that is mounted without locks


def lock_open_file(file: IO | int, *, wait: bool = True) -> None:
    """Lock an open file (a file object or a descriptor).

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
        OSError: the file system cannot lock files.
    """
    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def unlock_open_file(file: IO | int) -> None:
    """Unlock an open file. Closing it is not enough: a child process that was forked meanwhile has it open too."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def file_lock(path: Path) -> Generator[None]:
    """Hold the lock on the file `path`, which is created if it does not exist; wait while another process holds it.

    `path` should be a file that serves as a lock only: NFS locks files that are open for writing, so it locks no
    folders. On a file system without file locks (NO_FILE_LOCKS) nothing is locked.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        OSError: the file cannot be opened or locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            lock_open_file(descriptor)
        except OSError as error:
            if error.errno not in NO_FILE_LOCKS:
                raise
        yield
    finally:
        unlock_open_file(descriptor)
        os.close(descriptor)
