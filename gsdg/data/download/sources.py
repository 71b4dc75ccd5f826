"""Where the files of a data set are published, and the three ways to get them: HTTP, Google Drive, Hugging Face."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from gsdg.data.prepare.archives import is_archive
from gsdg.data.prepare.disk import check_space, mega
from gsdg.data.prepare.download import DownloadError, fetch
from gsdg.errors import DISK_FULL, UserError


@dataclass(frozen=True)
class Item:
    """A file, or a Hugging Face data set's files. `size` in bytes, 0 where it is not known before."""

    url: str
    name: str
    sha256: str | None = None
    size: int = 0

    @property
    def archive(self) -> bool:
        return self.name.endswith((".zip", ".tar", ".tar.gz", ".tgz"))

    def __str__(self) -> str:
        return f"{self.url} ({self.name}{f', {mega(self.size)} MB' if self.size else ''})"


def http(item: Item, folder: Path) -> None:
    fetch(item.url, folder / item.name, item.sha256)


def drive(item: Item, folder: Path) -> None:
    """Google Drive, which asks for a confirmation that gdown gives."""
    gdown, path = load("gdown"), folder / item.name
    if path.is_file():
        return
    print(f"{item.name} from {item.url}", file=sys.stderr)
    with_errors("gdown", lambda: gdown.download(item.url, str(path), quiet=_quiet(), resume=True))
    if not path.is_file():  # gdown before 5 returns None where it cannot
        raise DownloadError(f"{item.url}: gdown could not get it")


def hub(item: Item, folder: Path) -> None:
    """The Parquet files of a data set on Hugging Face, or on the mirror that $HF_ENDPOINT names."""
    library = load("huggingface_hub")
    repository = item.url.split("/datasets/")[1]
    options = {"repo_type": "dataset", "local_dir": str(folder), "allow_patterns": ["*.parquet"]}
    with_errors("huggingface_hub", lambda: library.snapshot_download(repository, **options))
    if not any(folder.rglob("*.parquet")):
        raise DownloadError(f"{item.url}: no Parquet files there")


@dataclass(frozen=True)
class Source:
    """All items of one publisher: together they make the data set."""

    name: str
    items: tuple[Item, ...]
    via: Callable[[Item, Path], None] = http

    def download(self, folder: Path) -> None:
        """All items into `folder`; what is there already stays. DownloadError: one cannot be had."""
        folder.mkdir(parents=True, exist_ok=True)
        here = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        check_space(folder, sum(item.size for item in self.items) - here, f"the files of {self.name}")
        for item in self.items:
            self.via(item, folder)
            if item.archive:
                _check_archive(item, folder / item.name)


def _check_archive(item: Item, path: Path) -> None:
    """DownloadError where a web page came instead, such as Google Drive's over its quota."""
    if is_archive(path):
        return
    with open(path, "rb") as file:
        begin = file.read(40)
    size = path.stat().st_size
    path.unlink()
    raise DownloadError(f"{item.url}: {size:,} bytes came that are no archive; they begin with {begin!r}")


def load(name: str) -> ModuleType:
    """An optional package. UserError: it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"this needs {name.split('.')[0]}, which cannot be imported ({error}). Install it: pip install "
            "'gsdg[download]' (in a checkout: pip install -e '.[download]'); or see --source and --from."
        ) from error


def with_errors(library: str, action: Callable[[], object]) -> None:
    """Run a library's download: whatever it raises is a DownloadError, but for a full disk."""
    try:
        action()
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        raise DownloadError(f"{library}: {' '.join(str(error).split())[:400] or type(error).__name__}") from error


def _quiet() -> bool:
    return not sys.stderr.isatty()  # its bar would fill a log
