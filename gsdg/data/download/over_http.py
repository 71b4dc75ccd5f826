"""Downloading one file over HTTP. An incomplete download is kept as `<name>.part`, and the next attempt resumes it."""

from __future__ import annotations

import hashlib
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from gsdg.data.download.disk import Unusable, check_space
from gsdg.utils.progress import Progress

PAUSES = (1, 2, 4, 8)  # seconds before each new attempt; after as many attempts without new bytes, give up
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20  # bytes read at a time


class DownloadError(Unusable):
    """A file could not be downloaded from an address."""


class _Interrupted(Exception):
    """The server answered, but the download is incomplete: try again."""


def fetch(url: str, path: Path, sha256: str | None = None) -> None:
    """Download `url` to `path`. If the file exists, it is taken as complete.

    Args:
        url: address of the file.
        path: where to put it; it does not exist until the download is complete.
        sha256: the expected SHA-256 in hexadecimal; None: not checked.

    Raises:
        DownloadError: no answer, an HTTP error, fewer bytes than announced, or another SHA-256.
    """
    if path.is_file():
        return
    part = path.with_name(f"{path.name}.part")
    most, attempts = _size(part), 0  # bytes received so far, attempts since then that have not brought more
    while True:
        try:
            _receive(url, part)
            break
        except _Interrupted as error:
            attempts = 0 if _size(part) > most else attempts + 1
            most = max(most, _size(part))
            if attempts == len(PAUSES):
                raise DownloadError(f"{url}: {error}. The same command resumes from {part}.") from error
            time.sleep(PAUSES[attempts])
    _check_hash(url, part, sha256)
    part.replace(path)


def _receive(url: str, part: Path) -> None:
    """Append the missing bytes to `part`; start from the beginning if the server does not support ranges."""
    have = _size(part)
    response = _request(url, have, part)
    if response is None:
        return
    with response:
        start = _start(response, have, part)
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        check_space(part.parent, 0 if total is None else total - have, url)
        with open(part, "ab" if start else "wb") as file, Progress(url, total, "MB", start) as progress:
            while block := _read(response):
                file.write(block)
                progress.add(len(block))
    if total is not None and _size(part) != total:
        raise _Interrupted(f"the download was interrupted: {_size(part):,} bytes found, {total:,} expected")


def _request(url: str, have: int, part: Path) -> HTTPResponse | None:
    """Request all bytes from offset `have`; None if there are none left."""
    headers = {"User-Agent": "gsdg", "Accept-Encoding": "identity"}  # byte ranges need the uncompressed content
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return None
        if error.code == 416:
            part.unlink()  # the server's file has changed and is shorter than `part`
        if error.code >= 500 or error.code in (408, 416, 429):
            raise _Interrupted(f"HTTP {error.code} {error.reason}") from error
        raise DownloadError(f"{url}: HTTP {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise DownloadError(f"{url}: no answer ({getattr(error, 'reason', error)})") from error


def _start(response: HTTPResponse, have: int, part: Path) -> int:
    """The offset of the response's first byte: `have` (status 206), or 0 (status 200: the complete file)."""
    if response.status != 206:
        return 0
    if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        part.unlink()
        raise _Interrupted(f"the server sent another range than requested: {response.headers.get('Content-Range')}")
    return have


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise _Interrupted(f"the connection was lost: {error}") from error


def _check_hash(url: str, part: Path, sha256: str | None) -> None:
    if sha256 is None:
        return
    with open(part, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    if actual != sha256:
        part.unlink()
        raise DownloadError(f"{url}: SHA-256 {actual} found, {sha256} expected: another file. It was removed.")


def _digest(file) -> str:
    """As hashlib.file_digest, which Python 3.10 does not have."""
    digest = hashlib.sha256()
    while block := file.read(CHUNK):
        digest.update(block)
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
