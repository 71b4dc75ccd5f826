"""Finding a tree of <domain>/<class>/<image> wherever it lies, and putting its images where they belong.

Images are hard-linked where the disk can, else copied; nothing that was given is moved or changed.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from gsdg.data.folders import folders_in, images_in
from gsdg.data.images import EXTENSIONS
from gsdg.data.progress import Progress
from gsdg.errors import UserError, listing

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)
# Spellings of a domain beside its own; case and everything but letters and digits are ignored anyway.
Spellings = Mapping[str, Sequence[str]]


def walk(place: Path) -> Iterator[Path]:
    """`place` and every folder below it, the nearest first; none that is hidden, a link or macOS's `__MACOSX`."""
    todo = deque([place] if place.is_dir() else [])
    while todo:
        folder = todo.popleft()
        yield folder
        names = [name for name in folders_in(folder) if name != "__MACOSX"]
        todo += [folder / name for name in names if not (folder / name).is_symlink()]


def files(places: Sequence[Path], suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Every file in `places` (folders, or files themselves) with one of these endings, in order of its folder."""
    for place in places:
        if place.is_file():
            found = [place]
        else:
            found = [folder / name for folder in walk(place) for name in sorted(os.listdir(folder))]
        for path in found:
            if path.name.lower().endswith(suffixes) and not path.name.startswith(".") and path.is_file():
                yield path


def find_tree(places: Sequence[Path], domains: Spellings) -> dict[str, Path] | None:
    """The folder of each domain: all lie in one folder, the nearest to the top that has them all."""
    for place in places:
        for folder in walk(place):
            names = spelt(folders_in(folder), domains)
            if set(names.values()) == set(domains):
                return {domain: folder / name for domain, name in _one_each(names, folder).items()}
    return None


def spelt(names: Sequence[str], domains: Spellings) -> dict[str, str]:
    """name -> the domain that it stands for, of those among `names` that stand for one."""
    meaning = {plain(word): domain for domain, words in domains.items() for word in (domain, *words)}
    return {name: meaning[plain(name)] for name in names if plain(name) in meaning}


def _one_each(names: Mapping[str, str], folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, domain in names.items():
        if domain in found:
            raise UserError(f"{folder}: {found[domain]} and {name} both stand for domain {domain}. Remove one.")
        found[domain] = name
    return found


def plain(name: str) -> str:
    """`Real World`, `RealWorld` and `real_world` are one."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def copy_tree(
    domains: Mapping[str, Path], target: Path, labels: Mapping[str, str], without: Collection[str] = ()
) -> int:
    """Every image to <target>/<domain>/<class>/<file>; how many of `without` (such paths) were left out.

    `labels` renames class folders. A domain with a folder `full` has its classes in there (VLCS in four splits).
    """
    left_out = 0
    with Progress("copying", None, "images") as progress:
        for domain, folder in domains.items():
            for label, name, path in _images(folder):
                own = f"{domain}/{labels.get(label, label)}/{name}"
                if own in without:
                    left_out += 1
                else:
                    put(path, target / own)
                    progress.add(1)
    return left_out


def _images(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(class folder, name below it, path) of every image of a domain that is not hidden."""
    top = folder / "full" if (folder / "full").is_dir() else folder
    for label in folders_in(top):
        for path in images_in(top / label):
            name = os.path.relpath(path, top / label)
            if not any(part.startswith(".") for part in name.split(os.sep)):
                yield label, name, path


def put(source: str | Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, target)


def count(tree: Path) -> dict[str, dict[str, int]]:
    """domain -> class -> images, of all folders."""
    return {
        domain: {label: len(images_in(tree / domain / label)) for label in folders_in(tree / domain)}
        for domain in folders_in(tree)
    }


def described(places: Sequence[Path]) -> str:
    """What a user sees when looking into `places`: for a message that something is not there."""
    names = [name for place in places if place.is_dir() for name in sorted(os.listdir(place))]
    names = names or [place.name for place in places]
    return listing(names[:8]) + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")


def image_files(places: Sequence[Path]) -> dict[str, Path]:
    """File name -> path, of every image anywhere in `places`."""
    return {path.name: path for path in files(places, EXTENSIONS)}
