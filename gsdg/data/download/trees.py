"""Finding a tree <domain>/<class>/<image> anywhere below given folders, and copying it to where a run reads it.

Images are hard-linked if the disk supports it, otherwise copied; the user's files are never moved or changed.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from gsdg.data.image_io import EXTENSIONS
from gsdg.data.walk import folders_in, images_in
from gsdg.utils.errors import UserError, listing
from gsdg.utils.progress import Progress

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)
# {domain: other spellings of its name}. Case, and characters other than letters and digits, are ignored anyway.
Spellings = Mapping[str, Sequence[str]]


def walk(place: Path) -> Iterator[Path]:
    """Yield `place` and every folder below it, breadth first; skips links, hidden folders and macOS's `__MACOSX`."""
    queue = deque([place] if place.is_dir() else [])
    while queue:
        folder = queue.popleft()
        yield folder
        queue += [folder / name for name in folders_in(folder) if not (folder / name).is_symlink()]


def files(places: Sequence[Path], suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield every file in `places` (folders or files) whose name ends in one of `suffixes`, folder by folder."""
    for place in places:
        if place.is_file():
            paths = [place]
        else:
            paths = [folder / name for folder in walk(place) for name in sorted(os.listdir(folder))]
        for path in paths:
            if path.name.lower().endswith(suffixes) and not path.name.startswith(".") and path.is_file():
                yield path


def find_tree(places: Sequence[Path], domains: Spellings) -> dict[str, Path] | None:
    """{domain: its folder}, all in one parent folder: the first, breadth first, that has all domains; None: no such."""
    for place in places:
        for folder in walk(place):
            domain_of = match_domains(folders_in(folder), domains)
            if set(domain_of.values()) == set(domains):
                return {domain: folder / name for domain, name in _invert(domain_of, folder).items()}
    return None


def match_domains(names: Sequence[str], domains: Spellings) -> dict[str, str]:
    """{name: the domain it stands for}, without the names that stand for no domain."""
    spellings = {normalize(word): domain for domain, words in domains.items() for word in (domain, *words)}
    return {name: spellings[normalize(name)] for name in names if normalize(name) in spellings}


def _invert(domain_of: Mapping[str, str], folder: Path) -> dict[str, str]:
    """{domain: name}. UserError: two names stand for the same domain."""
    name_of: dict[str, str] = {}
    for name, domain in domain_of.items():
        if domain in name_of:
            raise UserError(f"{folder}: {name_of[domain]} and {name} both stand for domain {domain}. Remove one.")
        name_of[domain] = name
    return name_of


def normalize(name: str) -> str:
    """The name in lower case, only letters and digits: the same for `Real World`, `RealWorld` and `real_world`."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def copy_tree(
    domains: Mapping[str, Path], target: Path, labels: Mapping[str, str], without: Collection[str] = ()
) -> int:
    """Copy or link every image to <target>/<domain>/<class>/<file>.

    Args:
        domains: {domain: its folder}. If it contains a folder `full` or `images`, the classes are in there: one release
            of VLCS has `full` next to the splits `train`, `crossval` and `test`, and Office-31 has `images`.
        target: the folder to build.
        labels: {class name in the source: class name in the target}; other classes keep their names.
        without: paths <domain>/<class>/<file> to leave out.

    Returns: how many images were left out.
    """
    left_out = 0
    with Progress("copying", None, "images") as progress:
        for domain, folder in domains.items():
            for label, name, path in _images(folder):
                relative = f"{domain}/{labels.get(label, label)}/{name}"
                if relative in without:
                    left_out += 1
                else:
                    link_or_copy(path, target / relative)
                    progress.add(1)
    return left_out


def _images(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (class folder, path relative to it, path) of every image of a domain that is not hidden."""
    top = next((folder / name for name in ("full", "images") if (folder / name).is_dir()), folder)
    for label in folders_in(top):
        for path in images_in(top / label):
            yield label, os.path.relpath(path, top / label), path


def link_or_copy(source: str | Path, target: Path) -> None:
    """Hard-link the file, or copy it if the disk does not support that; creates the target's folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, target)


def count_images(tree: Path) -> dict[str, dict[str, int]]:
    """{domain: {class: number of images}}, for all folders of a tree."""
    return {
        domain: {label: len(images_in(tree / domain / label)) for label in folders_in(tree / domain)}
        for domain in folders_in(tree)
    }


def list_contents(places: Sequence[Path]) -> str:
    """The names that a user sees in `places`, for a message that something is missing there."""
    names = [name for place in places if place.is_dir() for name in sorted(os.listdir(place))]
    names = names or [place.name for place in places]
    return listing(names[:8]) + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")


def image_files(places: Sequence[Path]) -> dict[str, Path]:
    """{file name: path} of every image in `places`."""
    return {path.name: path for path in files(places, EXTENSIONS)}
