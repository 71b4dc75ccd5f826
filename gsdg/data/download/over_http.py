"""One file over HTTP, to the byte. What a broken connection leaves is kept as `<name>.part`: the next start goes on."""

from __future__ import annotations

import hashlib
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from gsdg.data.prepare.disk import Unusable, check_space
from gsdg.data.progress import Progress

PAUSES = (1, 2, 4, 8)  # seconds before a new try; as many tries may bring nothing new
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20


class DownloadError(Unusable):
    """A file could not be had from an address."""


class _Broken(Exception):
    """The server answered, but not to the end: try again."""


def fetch(url: str, path: Path, sha256: str | None = None) -> None:
    """Download `url` to `path`, whole or not at all; a file that is there is taken as whole.

    DownloadError: no answer, an HTTP error, fewer bytes than announced, another SHA-256.
    """
    if path.is_file():
        return
    part = path.with_name(f"{path.name}.part")
    most, vain = _size(part), 0
    while True:
        try:
            _receive(url, part)
            break
        except _Broken as error:
            vain = 0 if _size(part) > most else vain + 1
            most = max(most, _size(part))
            if vain == len(PAUSES):
                raise DownloadError(f"{url}: {error}. The same command goes on from {part}.") from error
            time.sleep(PAUSES[vain])
    _check_hash(url, part, sha256)
    part.replace(path)


def _receive(url: str, part: Path) -> None:
    """Append what is missing to `part`; from the start where the server cannot do ranges."""
    have = _size(part)
    answer = _ask(url, have, part)
    if answer is None:
        return
    with answer:
        start = _start(answer, have, part)
        length = answer.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        check_space(part.parent, 0 if total is None else total - have, url)
        with open(part, "ab" if start else "wb") as file, Progress(url, total, "MB", start) as progress:
            while block := _read(answer):
                file.write(block)
                progress.add(len(block))
    if total is not None and _size(part) != total:
        raise _Broken(f"the download broke off: {_size(part):,} bytes found, {total:,} expected")


def _ask(url: str, have: int, part: Path) -> HTTPResponse | None:
    """The answer to a request for all bytes from `have` on; None where there are none left."""
    headers = {"User-Agent": "gsdg", "Accept-Encoding": "identity"}  # a compressed answer has no resumable length
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return None
        if error.code == 416:
            part.unlink()  # longer than the file is now
        if error.code >= 500 or error.code in (408, 416, 429):
            raise _Broken(f"HTTP {error.code} {error.reason}") from error
        raise DownloadError(f"{url}: HTTP {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise DownloadError(f"{url}: no answer ({getattr(error, 'reason', error)})") from error


def _start(answer: HTTPResponse, have: int, part: Path) -> int:
    """The offset of the answer's first byte: `have` (206), or 0 (200: the whole file again)."""
    if answer.status != 206:
        return 0
    if not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        part.unlink()
        raise _Broken(f"the server sent another range than was asked for: {answer.headers.get('Content-Range')}")
    return have


def _read(answer: HTTPResponse) -> bytes:
    try:
        return answer.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise _Broken(f"the connection broke: {error}") from error


def _check_hash(url: str, part: Path, sha256: str | None) -> None:
    if sha256 is None:
        return
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    if found != sha256:
        part.unlink()
        raise DownloadError(f"{url}: SHA-256 {found} found, {sha256} expected: not the file meant. It was removed.")


def _digest(file) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while block := file.read(CHUNK):
        digest.update(block)
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
