"""Where the files of a dataset are published, and three ways to download them: HTTP, Google Drive, Hugging Face."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from gsdg.data.download.archives import is_archive
from gsdg.data.download.disk import check_space, megabytes
from gsdg.data.download.over_http import DownloadError, fetch
from gsdg.utils.errors import DISK_FULL, UserError


@dataclass(frozen=True)
class Item:
    """A file, or the files of a dataset on Hugging Face.

    Args:
        url: its address.
        name: its file name, or for Hugging Face a pattern.
        sha256: the expected SHA-256; None: not checked.
        size: bytes, 0 if not known.
    """

    url: str
    name: str
    sha256: str | None = None
    size: int = 0

    @property
    def archive(self) -> bool:
        return self.name.endswith((".zip", ".tar", ".tar.gz", ".tgz"))

    def __str__(self) -> str:
        return f"{self.url} ({self.name}{f', {megabytes(self.size)} MB' if self.size else ''})"


def http(item: Item, folder: Path) -> None:
    """Download over HTTP."""
    fetch(item.url, folder / item.name, item.sha256)


def drive(item: Item, folder: Path) -> None:
    """Download from Google Drive with gdown, which answers Drive's confirmation page."""
    gdown, path = import_optional("gdown"), folder / item.name
    if path.is_file():
        return
    print(f"{item.name} from {item.url}", file=sys.stderr)
    call_library("gdown", lambda: gdown.download(item.url, str(path), quiet=_quiet(), resume=True))
    if not path.is_file():  # gdown before version 5 returns None instead of raising
        raise DownloadError(f"{item.url}: gdown could not download it")


def drive_or_http(item: Item, folder: Path) -> None:
    """Download from Google Drive if that is where the item is, else over HTTP."""
    (drive if "drive.google.com" in item.url else http)(item, folder)


def hub(item: Item, folder: Path) -> None:
    """Download the Parquet files of a dataset from Hugging Face, or from the mirror in $HF_ENDPOINT."""
    library = import_optional("huggingface_hub")
    repository = item.url.split("/datasets/")[1]
    options = {"repo_type": "dataset", "local_dir": str(folder), "allow_patterns": ["*.parquet"]}
    call_library("huggingface_hub", lambda: library.snapshot_download(repository, **options))
    if not any(folder.rglob("*.parquet")):
        raise DownloadError(f"{item.url}: no Parquet files there")


@dataclass(frozen=True)
class Source:
    """A publisher of a dataset.

    Args:
        name: its name, for --source.
        items: the files that together make up the dataset.
        via: downloads an item into a folder: `http`, `drive`, `drive_or_http` or `hub`.
    """

    name: str
    items: tuple[Item, ...]
    via: Callable[[Item, Path], None] = http

    def download(self, folder: Path) -> None:
        """Download all items into `folder`; existing files are kept. DownloadError: an item cannot be downloaded."""
        folder.mkdir(parents=True, exist_ok=True)
        existing = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        check_space(folder, sum(item.size for item in self.items) - existing, f"the files of {self.name}")
        for item in self.items:
            self.via(item, folder)
            if item.archive:
                _check_archive(item, folder / item.name)


def _check_archive(item: Item, path: Path) -> None:
    """DownloadError if the file is not an archive, such as Google Drive's web page about an exceeded quota."""
    if is_archive(path):
        return
    with open(path, "rb") as file:
        first_bytes = file.read(40)
    size = path.stat().st_size
    path.unlink()
    raise DownloadError(f"{item.url}: received {size:,} bytes that are not an archive; they begin with {first_bytes!r}")


def import_optional(name: str) -> ModuleType:
    """Import an optional package. UserError: it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"this needs {name.split('.')[0]}, which cannot be imported ({error}). Install it: pip install "
            "'gsdg[download]' (in a checkout: pip install -e '.[download]'); or see --source and --from."
        ) from error


def call_library(library: str, action: Callable[[], object]) -> None:
    """Run a library's download. Every exception becomes a DownloadError, except the OSError of a full disk."""
    try:
        action()
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        raise DownloadError(f"{library}: {' '.join(str(error).split())[:400] or type(error).__name__}") from error


def _quiet() -> bool:
    """Whether gdown must not draw its progress bar, which would fill a log file."""
    return not sys.stderr.isatty()
