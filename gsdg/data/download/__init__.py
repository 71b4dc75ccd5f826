"""Prepare a dataset: from its publisher, or from files the user has, to the folder that a run reads.

Steps: find or download the files, unpack them, build the tree in a hidden folder next to the final one, compare it with
the published numbers, and only then rename it. So the final folder is complete and checked, or does not exist. The
user's files are never changed, nor is a final folder that already exists.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from omegaconf import DictConfig

from gsdg.data.download.archives import is_archive, unpack
from gsdg.data.download.disk import Damaged, Unusable, build_folder, remove
from gsdg.data.download.listed import LIST, Listed
from gsdg.data.download.recipes import RECIPES, Images, Recipe
from gsdg.data.download.sources import Source
from gsdg.utils.errors import UserError, listing

MOST_LINES = 10  # differences listed in a message


def prepare(config: DictConfig, *, given: Path | None, source: str | None, accept_counts: bool) -> str:
    """Prepare the dataset of `config` and return a short report.

    Args:
        config: with `dataset` and `data_dir`.
        given: an archive or folder the user has; None: download.
        source: name of the only source to download from; None: each source of the recipe, until one works.
        accept_counts: accept numbers of images that differ from the published ones.

    Raises:
        UserError: the files cannot be downloaded, read or written, or differ from what is published.
    """
    name = config.dataset.name
    recipe = _recipe(name)
    sources = _selected_sources(name, recipe.sources, source)
    given = _existing(given)
    data_dir = Path(config.data_dir).expanduser().absolute()
    final = data_dir / _folder(name, config)
    if _is_occupied(final):
        return _already_exists_report(config, data_dir, final)
    # Build in a hidden folder, check, rename. Another process may have done so before this one got the lock.
    with build_folder(final) as building:
        if _is_occupied(final):
            return _already_exists_report(config, data_dir, final)
        tree = building / "tree"
        notes = _build(recipe, given, tree) if given else _download(name, recipe, sources, data_dir, tree)
        summary, faults = recipe.inspect(name, tree)
        if faults and not accept_counts:
            raise UserError(_faults_message(name, faults))
        remove(building / "unpacked")
        os.replace(tree, final)
    # The downloads are no longer needed, unless they are the files that the user has given.
    if not given or not given.is_relative_to(data_dir / ".downloads"):
        _remove_downloads(data_dir / ".downloads", name)
    lines = [f"{name}: {final}", summary, *notes, *(f"accepted: {fault}" for fault in _first(faults))]
    return "\n  ".join(lines) + _next_commands(config, data_dir)


def _recipe(name: str) -> Recipe:
    if name in RECIPES:
        return RECIPES[name]
    why = "these are your own images" if name in ("image_folder", "list") else "it ships with gsdg"
    raise UserError(f"{name}: nothing to prepare, {why}. Valid: {listing(RECIPES)}.")


def _folder(name: str, config: DictConfig) -> Path:
    """The folder to prepare, absolute or relative to data_dir: dataset.root, or the folder of the list dataset.file."""
    if "root" in config.dataset:
        return Path(config.dataset.root).expanduser()
    file = Path(config.dataset.file).expanduser()
    if file.name != LIST or not file.parent.name:
        raise UserError(
            f"{name}: dataset.file={file}: the list is prepared in a folder of its own, as <folder>/{LIST}."
        )
    return file.parent


def _selected_sources(name: str, sources: Sequence[Source], wanted: str | None) -> Sequence[Source]:
    if wanted is None:
        return sources
    if selected := [source for source in sources if source.name == wanted]:
        return selected
    raise UserError(f"{name}: --source {wanted} is unknown. Valid: {listing(source.name for source in sources)}.")


def _existing(given: Path | None) -> Path | None:
    """The absolute path of --from. UserError: there is no such file."""
    if given is None:
        return None
    given = given.expanduser().absolute()
    if not given.exists():
        raise UserError(f"--from {given}: there is no such file or folder.")
    return given


def _is_occupied(final: Path) -> bool:
    """Whether something exists at this path, other than an empty folder."""
    empty = final.is_dir() and not final.is_symlink() and not any(final.iterdir())
    return os.path.lexists(final) and not empty


def _build(recipe: Recipe, material: Path, tree: Path) -> list[str]:
    """Build `tree` and return lines for the report.

    Args:
        material: a folder with the unpacked files or with archives of them, one archive, or one Parquet file.
        tree: the folder to build.
    """
    # First look for unpacked files.
    remove(tree)
    archives = [material]
    if material.is_dir() or material.suffix == ".parquet":
        try:
            return recipe.build([material], tree)
        except Unusable:
            if not (archives := _archives(recipe, material)):
                raise
    # Otherwise unpack the archives. Remove what an attempt with a damaged file may have left.
    unpacked = tree.with_name("unpacked")
    remove(unpacked)
    remove(tree)
    for archive in archives:
        unpack(archive, unpacked)
    return recipe.build([unpacked, material], tree)


def _archives(recipe: Recipe, folder: Path) -> list[Path]:
    """The files in `folder` with the names of the recipe's archives; if there are none, the only archive."""
    names = [item.name for source in recipe.sources for item in source.items if item.archive]
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if by_name := [path for path in files if any(fnmatch(path.name, name) for name in (*names, *recipe.archives))]:
        return by_name
    if len(archives := [path for path in files if is_archive(path)]) < 2:
        return archives
    raise UserError(
        f"{folder} holds several archives: {listing(path.name for path in archives)}. Name one with --from."
    )


def _download(name: str, recipe: Recipe, sources: Sequence[Source], data_dir: Path, tree: Path) -> list[str]:
    """Download from each source in turn, until one works, and build `tree`. UserError: none works."""
    failures = []
    for source in sources:
        folder = data_dir / ".downloads" / name / source.name
        try:
            source.download(folder)
            return [f"from {source.name}", *_build(recipe, folder, tree)]
        except Unusable as error:
            failures.append(str(error))
            if isinstance(error, Damaged):
                error.path.unlink()  # otherwise the next attempt would take it for a finished download
    raise UserError(_no_source_message(name, sources, failures, data_dir))


def _no_source_message(name: str, sources: Sequence[Source], failures: Sequence[str], data_dir: Path) -> str:
    lines = [f"downloading {name} from {listing(source.name for source in sources)} failed."]
    for source, failure in zip(sources, failures, strict=True):
        lines += [f"{source.name}: {failure}", *(f"    {item}" for item in source.items)]
    return "\n  ".join(
        [
            *lines,
            "Without internet here: get the files of one source on another machine, put them into a folder, and:",
            f"    {_command('prepare', name, data_dir)} --from <that folder>",
        ]
    )


def _faults_message(name: str, faults: Sequence[str]) -> str:
    return "\n  ".join(
        [
            f"{name}: this is not the published data set; nothing was put in place.",
            *_first(faults),
            "Is it another edition, or incomplete? Get it again, or accept it as it is: --accept-counts.",
        ]
    )


def _first(faults: Sequence[str]) -> list[str]:
    more = [f"and {len(faults) - MOST_LINES:,} more"] if len(faults) > MOST_LINES else []
    return [*faults[:MOST_LINES], *more]


def _already_exists_report(config: DictConfig, data_dir: Path, final: Path) -> str:
    report = f"{config.dataset.name}: {final} already exists and was not changed. To prepare it again, move it away."
    return report + _next_commands(config, data_dir)


def _next_commands(config: DictConfig, data_dir: Path) -> str:
    """The commands to run after preparing."""
    name = config.dataset.name
    recipe = RECIPES[name]
    split = recipe.split if isinstance(recipe, Listed) else f"split.target={shlex.quote(config.dataset.domains[0])}"
    run = f"python launch.py dataset={name} model={recipe.model} {split} {_override(data_dir)}"
    if isinstance(recipe, Images | Listed):
        return f"\nNext: {_command('verify', name, data_dir)}\nThen: {run}"
    return f"\nNext: {run}"


def _command(verb: str, name: str, data_dir: Path) -> str:
    return f"python -m gsdg.data {verb} {name} {_override(data_dir)}"


def _override(data_dir: Path) -> str:
    return shlex.quote(f"data_dir={data_dir}")


def _remove_downloads(downloads: Path, name: str) -> None:
    shutil.rmtree(downloads / name, ignore_errors=True)
    if downloads.is_dir() and not any(downloads.iterdir()):
        downloads.rmdir()
