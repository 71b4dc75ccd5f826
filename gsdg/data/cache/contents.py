"""The commands `list` and `remove` of `python -m gsdg.data cache`: which decoded images lie on disk.

A folder that is being built is never removed. On a local disk, a run that has its images open can use them until it
ends; runs that start after the removal decode again.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gsdg.data.cache.builder import is_complete
from gsdg.data.cache.memory_map import BESIDE, home_cache
from gsdg.utils.errors import UserError, listing, plural
from gsdg.utils.file_locks import lock_open_file
from gsdg.utils.json_files import read_json
from gsdg.utils.text import align_columns

DAY = 86_400


@dataclass
class Entry:
    """A folder with the decoded images of a domain, or with what a killed build has left.

    Args:
        folder: its path.
        domain: name of the domain, "?" if it is not known.
        images: number of images.
        size: bytes on disk.
        made: when it was last written, in seconds since the epoch.
        finished: whether it is complete.
        sources: the image folders that are known to have this content.
    """

    folder: Path
    domain: str
    images: int
    size: int
    made: float
    finished: bool
    sources: list[str] = field(default_factory=list)

    @property
    def gone(self) -> bool:
        """Whether none of its sources exists any more; False if no source is known."""
        return bool(self.sources) and not any(map(os.path.isdir, self.sources))

    @property
    def cells(self) -> list[str]:
        """Its row in the table."""
        days = max(0, int((time.time() - self.made) // DAY))
        source = "unfinished" if not self.finished else "source unknown" if not self.sources else listing(self.sources)
        missing = " (no longer there)" if self.gone else ""
        size = f"{self.size / 1e6:,.1f} MB"
        return [self.folder.name, size, f"{self.images:,}", f"{days} d", self.domain, source + missing]


def cache_folders(given: Sequence[str]) -> list[Path]:
    """The cache folders that the user means.

    Args:
        given: cache folders, or folders of datasets (`/data` or `data_dir=/data`) with a cache folder in them. Empty:
            the cache in ./data and the one in the home directory, if they exist.

    Raises:
        UserError: one of `given` is neither.
    """
    if not given:
        return [folder for folder in (Path("data", BESIDE), home_cache()) if folder and folder.is_dir()]
    named = [Path(word.removeprefix("data_dir=")).expanduser() for word in given]
    folders = [path / BESIDE if (path / BESIDE).is_dir() else path for path in named]
    if wrong := [folder for folder in folders if not (folder / "seen").is_dir()]:
        raise UserError(
            f"no decoded images in {listing(wrong)}. Valid: a folder that was given as dataset.cache, or a data_dir "
            f"with a folder {BESIDE} in it."
        )
    return folders


def entries(root: Path) -> list[Entry]:
    """All entries in one cache folder, the largest first."""
    notes = [read_json(path) for path in (root / "seen").glob("*.json")]
    all_entries = [_entry(folder, notes) for folder in root.iterdir() if _is_entry(folder)]
    return sorted(all_entries, key=lambda entry: -entry.size)


def _is_entry(folder: Path) -> bool:
    """Whether gsdg made the folder, by its files or its name; anything else is neither listed nor removed."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    building = folder.name.startswith(".") and folder.name.endswith(".building")
    return building or (folder / "about.json").is_file()


def _entry(folder: Path, notes: list[dict]) -> Entry:
    about = read_json(folder / "about.json")
    files = [path.stat() for path in folder.iterdir()]
    content = about.get("content")
    sources = [note["folder"] for note in notes if note.get("content") == content and "folder" in note]
    return Entry(
        folder,
        about.get("domain", "?"),
        about.get("images", 0),
        sum(file.st_blocks * 512 for file in files),
        max((file.st_mtime for file in files), default=folder.stat().st_mtime),
        is_complete(folder),
        sorted(set(sources)),
    )


def table(rows: Sequence[Entry]) -> str:
    """One line per entry, in columns, and the sum."""
    lines = align_columns([["folder", "size", "images", "age", "domain", "source"], *(entry.cells for entry in rows)])
    return "\n".join([*lines, f"{plural(len(rows), 'folder')}, {sum(entry.size for entry in rows) / 1e6:,.1f} MB"])


def select(
    candidates: Sequence[Entry], *, names: Sequence[str], gone: bool, older: float | None, every: bool
) -> list[Entry]:
    """The entries to remove: those that meet all of the given conditions.

    Args:
        names: only folders with these names.
        gone: only entries whose sources no longer exist, and unfinished ones.
        older: only entries older than this many days.
        every: all entries; needed if there is no other condition.

    Raises:
        UserError: no condition is given, or a name is unknown.
    """
    if not (names or gone or older is not None or every):
        raise UserError("which ones? Name folders as `cache list` shows them, or add --gone, --older DAYS, or --all.")
    if unknown := [name for name in names if name not in [entry.folder.name for entry in candidates]]:
        raise UserError(f"no folder of decoded images is called {listing(unknown)}. `cache list` shows them.")
    limit = time.time() - (older or 0) * DAY
    selected = [entry for entry in candidates if not names or entry.folder.name in names]
    selected = [entry for entry in selected if not gone or entry.gone or not entry.finished]
    return [entry for entry in selected if older is None or entry.made < limit]


def remove(entry: Entry) -> bool:
    """Remove the folder and, if no other folder has its content, the notes about it. False: it is being built now."""
    root, name = entry.folder.parent, entry.folder.name
    with _try_lock(root / f".{name.split('.')[1] if name.startswith('.') else name}.lock") as free:
        if not free:
            return False
        content = read_json(entry.folder / "about.json").get("content")
        # Rename first: if this process is killed, no run finds a half-removed folder.
        renamed = root / f".{name.lstrip('.')}.removed.building"
        os.rename(entry.folder, renamed)
        shutil.rmtree(renamed)
    if content not in [read_json(folder / "about.json").get("content") for folder in root.iterdir()]:
        _remove_notes(root, content)
    return True


def _remove_notes(root: Path, content: str | None) -> None:
    for note in (root / "seen").glob("*.json"):
        if read_json(note).get("content") == content:
            note.unlink(missing_ok=True)


@contextmanager
def _try_lock(lock: Path) -> Generator[bool]:
    """Hold the lock of a build. Yields False if another process holds it, True also where locks do not work."""
    with lock.open("ab") as file:
        try:
            lock_open_file(file, wait=False)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True
