"""Which files below a folder are images of a dataset.

Skipped are the files that macOS, Windows, Jupyter and network drives leave behind: files and folders whose names start
with a dot (`._1.png`, `.ipynb_checkpoints`), and the folders of FOREIGN. Deviation: DomainBed, which reads folders with
torchvision, counts such copies of images as images. Links to folders are followed, except a link to a folder that
contains the link (a loop).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gsdg.data.image_io import EXTENSIONS
from gsdg.utils.errors import UserError

FOREIGN = ("__MACOSX", "@eaDir")  # macOS's archiver, Synology's thumbnails


class Contents(NamedTuple):
    """The images below a folder, in the order in which torchvision walks it."""

    images: list[str]  # paths
    hidden: list[str]  # paths of images that are skipped, because they or a folder above them are hidden
    loops: list[str]  # one message per link to a folder that contains the link


def is_hidden(name: str) -> bool:
    """Whether files and folders of this name are skipped."""
    return name.startswith(".") or name in FOREIGN


def folders_in(parent: Path) -> list[str]:
    """The names of the folders in `parent` that are not hidden, sorted."""
    with os.scandir(parent) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))


def images_in(folder: Path) -> list[str]:
    """The paths of all images below a folder that are not hidden. UserError: a link to a folder that contains it."""
    contents = contents_of(folder)
    if contents.loops:
        raise UserError("\n".join(contents.loops))
    return contents.images


def contents_of(folder: Path) -> Contents:
    """List the images below a folder: folders sorted by path, files by name. UserError: a folder cannot be listed."""
    images, hidden, loops = [], [], []
    if loop := loop_at(folder):
        return Contents([], [], [loop])
    for parent, names in sorted(_walk(str(folder), [os.path.realpath(folder)], loops)):
        inside = os.path.relpath(parent, folder).split(os.sep)
        parent_is_hidden = inside != ["."] and any(map(is_hidden, inside))
        for name in sorted(name for name in names if name.lower().endswith(EXTENSIONS)):
            (hidden if parent_is_hidden or is_hidden(name) else images).append(os.path.join(parent, name))
    return Contents(images, hidden, loops)


def files_in(folder: Path) -> list[str]:
    """The paths of all files below a folder, including hidden files and files that are not images."""
    walked = sorted(_walk(str(folder), [os.path.realpath(folder)], []))
    return [os.path.join(parent, name) for parent, names in walked for name in sorted(names)]


def _walk(folder: str, above: list[str], loops: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, names of its files) for the folder and every folder below it; links that are loops are skipped.

    Args:
        above: real paths of the folders through which the walk came here, the last one is `folder` itself.
        loops: one message per skipped link is appended.
    """
    names = []
    for entry in _entries(folder):
        if not entry.is_dir():
            names.append(entry.name)
        elif loop := loop_at(entry.path, above) if entry.is_symlink() else "":
            loops.append(loop)
        else:
            real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
            yield from _walk(entry.path, [*above, real], loops)
    yield folder, names


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(
            f"cannot list the folder {folder} ({error.strerror}): its images would be missing. "
            "Make it readable, or remove it."
        ) from error


def loop_at(path: str | Path, above: list[str] | None = None) -> str:
    """A message if `path` is a link to a folder that contains it, which must not be followed; otherwise "".

    above: real paths of the folders through which a walk reached the link; a link to one of them is a loop as well.
    """
    if not os.path.islink(path):
        return ""
    target = os.path.realpath(path)
    containing = [os.path.realpath(os.path.dirname(path)), *(above or [])]
    if not any(folder == target or folder.startswith(target.rstrip(os.sep) + os.sep) for folder in containing):
        return ""
    return (
        f"{path} is a link to {target}, which contains the link: images would be read again and again. "
        f"Remove the link: rm {shlex.quote(str(path))}"
    )
