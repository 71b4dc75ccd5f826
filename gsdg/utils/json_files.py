"""JSON files that are replaced atomically, and append-only files of JSON lines. Standard library only.

Every failed read or write raises an OSError whose `filename` is set, and leaves the file as it was before.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from gsdg.utils.file_locks import lock_open_file, unlock_open_file

# Errors of file systems on which a folder cannot be opened or fsynced; `flush_folder` ignores them.
NO_FOLDER_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES, errno.EBADF)


# ---- files that are replaced atomically -----------------------------------------------------------------------------


def write_json(path: Path, value: object, *, flush: bool = False) -> None:
    """Replace `path` atomically by `value` as JSON: a reader sees the old or the new text, never a part of it.

    Args:
        flush: fsync the file and its folder, so that the new text survives a power failure.
    """
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode(), flush=flush)


def replace_file(path: Path, content: bytes, *, flush: bool = False) -> None:
    """As `write_json`, for any bytes. If writing fails, the temporary file is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with _file_named(path), temporary.open("wb") as file:
            file.write(content)
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if flush:
        flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Fsync a folder: without it, a new or renamed file in it may be missing after a power failure."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_FLUSH:
            raise


def load_json(path: Path) -> dict:
    """The JSON object in `path`; {} if the file is missing or holds no JSON object. OSError: it cannot be read."""
    try:
        with _file_named(path):
            return parse_object(path.read_bytes()) or {}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def read_json(path: Path) -> dict:
    """As `load_json`, but {} if the file cannot be read: for commands that list many runs without changing them."""
    try:
        return load_json(path)
    except OSError:
        return {}


# ---- append-only files of lines -------------------------------------------------------------------------------------


def append_line(path: Path, value: dict, *, flush: bool = False) -> None:
    """Append one JSON line; see `append_text`."""
    append_text(path, json.dumps(value) + "\n", flush=flush)


def append_text(path: Path, text: str, *, flush: bool = False) -> None:
    """Append `text` on a new line. OSError: it could not be written completely, and nothing was appended.

    Where the file system supports locks, concurrent appends wait for each other. A process killed while it writes may
    leave a truncated last line; the next append starts a new line after it.

    Args:
        text: one or more complete lines, each ending in a newline.
        flush: fsync the file, and the folder of a new file, so that the line survives a power failure.
    """
    with _file_named(path), path.open("ab+", buffering=0) as file, _locked(file):
        end = file.seek(0, os.SEEK_END)
        content = (b"" if _ends_in_newline(file, end) else b"\n") + text.encode()
        try:
            _write_all(file, content)
            if flush:
                os.fsync(file.fileno())
        except BaseException:
            _cut_back(file, end, len(content))
            raise
    if flush and not end:
        flush_folder(path.parent)


def read_lines(path: Path) -> list[dict]:
    """Every object in a file of JSON lines; [] if there is no file. Lines without a complete object are skipped."""
    values = map(parse_object, raw_lines(path))
    return [value for value in values if value is not None]


def raw_lines(path: Path) -> list[bytes]:
    """The lines of a file that are not blank; [] if there is no file."""
    try:
        with _file_named(path):
            content = path.read_bytes()
    except FileNotFoundError:
        return []
    return [line for line in content.split(b"\n") if line.strip()]


def parse_object(text: bytes) -> dict | None:
    """The JSON object in `text`; None if the text is truncated, not UTF-8, or JSON that is not an object."""
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _ends_in_newline(file: BinaryIO, end: int) -> bool:
    file.seek(max(0, end - 1))
    return file.read(1) in (b"", b"\n")


def _write_all(file: BinaryIO, content: bytes) -> None:
    """Write all of `content`. On a nearly full disk a write may be partial; the next write then raises."""
    while content:
        written = file.write(content)
        if not written:
            raise OSError(errno.EIO, "the file system wrote nothing and gave no reason")
        content = content[written:]


def _cut_back(file: BinaryIO, end: int, length: int) -> None:
    """Truncate a partly written line, unless the file has grown by more: then another process appended after it."""
    with contextlib.suppress(OSError):
        if file.seek(0, os.SEEK_END) <= end + length:
            file.truncate(end)


@contextlib.contextmanager
def _locked(file: BinaryIO) -> Generator[None]:
    """Hold an exclusive lock on `file`; without effect on a file system that does not support locks."""
    with contextlib.suppress(OSError):
        lock_open_file(file)
    try:
        yield
    finally:
        # Closing the file would not release the lock if a process forked in the meantime still has it open.
        unlock_open_file(file)


@contextlib.contextmanager
def _file_named(path: Path) -> Generator[None]:
    """Set `filename` on an OSError: the system sets it when a file cannot be opened, not when a read or write fails."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
