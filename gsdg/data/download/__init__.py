"""A data set, from its publisher or from files you have, to the folder that a run reads: whole, checked, or not at all.

Find or download, unpack, build in a hidden folder beside the final place, compare with what is published, and only then
rename it. What was given is never changed, nor a folder that is there already.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from omegaconf import DictConfig

from gsdg.data.prepare.archives import is_archive, unpack
from gsdg.data.prepare.disk import Damaged, Unusable, remove, workplace
from gsdg.data.prepare.recipes import RECIPES, Images, Recipe
from gsdg.data.prepare.sources import Source
from gsdg.errors import UserError, listing

MOST_LINES = 10  # of differing counts, in a message


def prepare(config: DictConfig, *, given: Path | None, source: str | None, accept_counts: bool) -> str:
    """Put the data set of `config` in place, from `given` or else from its sources in turn; a short report."""
    name = config.dataset.name
    recipe = _recipe(name)
    sources = _chosen(name, recipe.sources, source)
    given = _existing(given)
    data_dir = Path(config.data_dir).expanduser().absolute()
    final = data_dir / Path(config.dataset.root).expanduser()
    if _taken(final):
        return _already(config, data_dir, final)
    with workplace(final) as building:
        if _taken(final):  # by another process, while this one came here
            return _already(config, data_dir, final)
        tree = building / "tree"
        notes = _build(recipe, given, tree) if given else _download(name, recipe, sources, data_dir, tree)
        said, faults = recipe.inspect(name, tree)
        if faults and not accept_counts:
            raise UserError(_differs(name, faults))
        remove(building / "unpacked")
        os.replace(tree, final)
    if not given or not given.is_relative_to(data_dir / ".downloads"):
        _clear(data_dir / ".downloads", name)
    lines = [f"{name}: {final}", said, *notes, *(f"accepted: {fault}" for fault in _first(faults))]
    return "\n  ".join(lines) + _next(config, data_dir)


def _recipe(name: str) -> Recipe:
    if name in RECIPES:
        return RECIPES[name]
    why = {"image_folder": "these are your own images"}.get(name, "it ships with gsdg")
    raise UserError(f"{name}: nothing to prepare, {why}. Valid: {listing(RECIPES)}.")


def _chosen(name: str, sources: Sequence[Source], wanted: str | None) -> Sequence[Source]:
    if wanted is None:
        return sources
    if found := [one for one in sources if one.name == wanted]:
        return found
    raise UserError(f"{name}: --source {wanted} is unknown. Valid: {listing(one.name for one in sources)}.")


def _existing(given: Path | None) -> Path | None:
    if given is None:
        return None
    given = given.expanduser().absolute()
    if not given.exists():
        raise UserError(f"--from {given}: there is no such file or folder.")
    return given


def _taken(final: Path) -> bool:
    """Anything but an empty folder."""
    empty = final.is_dir() and not final.is_symlink() and not any(final.iterdir())
    return os.path.lexists(final) and not empty


def _build(recipe: Recipe, material: Path, tree: Path) -> list[str]:
    """Make `tree` from a folder that has the parts, or has archives of them, or from one archive."""
    remove(tree)
    archives = [material]
    if material.is_dir() or material.suffix == ".parquet":
        try:
            return recipe.build([material], tree)
        except Unusable:
            if not (archives := _archives(recipe, material)):
                raise
    unpacked = tree.with_name("unpacked")
    remove(unpacked)
    remove(tree)  # of what a damaged shard left
    for archive in archives:
        unpack(archive, unpacked)
    return recipe.build([unpacked, material], tree)


def _archives(recipe: Recipe, folder: Path) -> list[Path]:
    """The files in `folder` that bear the names of the recipe's archives; else the only archive."""
    names = [item.name for source in recipe.sources for item in source.items if item.archive]
    inside = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if own := [path for path in inside if any(fnmatch(path.name, name) for name in (*names, *recipe.archives))]:
        return own
    if len(found := [path for path in inside if is_archive(path)]) < 2:
        return found
    raise UserError(f"{folder} holds several archives: {listing(path.name for path in found)}. Name one with --from.")


def _download(name: str, recipe: Recipe, sources: Sequence[Source], data_dir: Path, tree: Path) -> list[str]:
    """Each source in turn, until one gives the data set. UserError: none does."""
    failures = []
    for source in sources:
        folder = data_dir / ".downloads" / name / source.name
        try:
            source.download(folder)
            return [f"from {source.name}", *_build(recipe, folder, tree)]
        except Unusable as error:
            failures.append(str(error))
            if isinstance(error, Damaged):
                error.path.unlink()  # or the same command would find it again
    raise UserError(_nowhere(name, sources, failures, data_dir))


def _nowhere(name: str, sources: Sequence[Source], failures: Sequence[str], data_dir: Path) -> str:
    lines = [f"{name} could not be had from {listing(source.name for source in sources)}."]
    for source, failure in zip(sources, failures, strict=True):
        lines += [f"{source.name}: {failure}", *(f"    {item}" for item in source.items)]
    return "\n  ".join(
        [
            *lines,
            "Without internet here: get the files of one source on another machine, put them into a folder, and:",
            f"    {_command('prepare', name, data_dir)} --from <that folder>",
        ]
    )


def _differs(name: str, faults: Sequence[str]) -> str:
    return "\n  ".join(
        [
            f"{name}: this is not the published data set; nothing was put in place.",
            *_first(faults),
            "Is it another edition, or a part? Get it again, or take it as it is: --accept-counts.",
        ]
    )


def _first(faults: Sequence[str]) -> list[str]:
    more = [f"and {len(faults) - MOST_LINES:,} more"] if len(faults) > MOST_LINES else []
    return [*faults[:MOST_LINES], *more]


def _already(config: DictConfig, data_dir: Path, final: Path) -> str:
    said = f"{config.dataset.name}: {final} is there already, and stays as it is. To make it anew, move it away."
    return said + _next(config, data_dir)


def _next(config: DictConfig, data_dir: Path) -> str:
    name, target = config.dataset.name, config.dataset.domains[0]
    model = RECIPES[name].model
    run = f"python launch.py dataset={name} model={model} split.target={shlex.quote(target)} {_at(data_dir)}"
    if isinstance(RECIPES[name], Images):
        return f"\nNext: {_command('verify', name, data_dir)}\nThen: {run}"
    return f"\nNext: {run}"


def _command(verb: str, name: str, data_dir: Path) -> str:
    return f"python -m gsdg.data {verb} {name} {_at(data_dir)}"


def _at(data_dir: Path) -> str:
    return shlex.quote(f"data_dir={data_dir}")


def _clear(downloads: Path, name: str) -> None:
    shutil.rmtree(downloads / name, ignore_errors=True)
    if downloads.is_dir() and not any(downloads.iterdir()):
        downloads.rmdir()
