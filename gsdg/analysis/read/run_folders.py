"""Resolves command-line arguments to run folders: paths, run ids as tables print them, and prefixes of both."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from gsdg.analysis.read.frames import READERS
from gsdg.utils.errors import UserError, listing


def folders_of(words: Sequence[str], runs_dir: str) -> list[str]:
    """The folder of each word: an existing folder, or the run with this path, id, or unique prefix of one.

    Args:
        runs_dir: where ids are looked up, besides the current directory.

    A word that fits no run is returned unchanged.

    Raises:
        UserError: a word is a prefix of several runs.
    """
    return [word if os.path.isdir(word) else _run_named(word, runs_dir) or word for word in words]


def ids_of(words: Iterable[str], folders: Sequence[str]) -> list[str]:
    """The run id in `folders` that each word is, or is a unique prefix of; a word that fits none stays unchanged."""
    return [_only(word, {path.name for folder in folders for path in _runs_in(Path(folder), word)}) for word in words]


def _run_named(word: str, runs_dir: str) -> str | None:
    """The run folder whose path, or whose id in the current directory or `runs_dir`, begins with `word`."""
    path = Path(word)
    parents = [path.parent] if path.parent != Path() else [Path(), Path(runs_dir)]
    paths = {str(run): run for parent in parents for run in _runs_in(parent, path.name)}
    if len(paths) > 1:
        raise UserError(_ambiguous(word, paths))
    return next(iter(paths), None)


def _only(word: str, run_ids: set[str]) -> str:
    if len(run_ids) > 1:
        raise UserError(_ambiguous(f"--runs {word}", run_ids))
    return next(iter(run_ids), word)


def _ambiguous(what: str, runs: Iterable[str]) -> str:
    return f"{what}: several runs begin with this: {listing(sorted(runs))}. Give more characters of the one you mean."


def _runs_in(parent: Path, word: str) -> list[Path]:
    """The run folder in `parent` named `word`, or else all that begin with it. Of `<id>:swad`, only the id is used."""
    name = word.partition(":")[0]
    try:
        entries = [entry for entry in os.listdir(parent) if name and entry.startswith(name)]
    except OSError:
        return []
    runs = [
        parent / entry
        for entry in sorted(entries)
        if any(os.path.exists(parent / entry / marker) for marker in READERS)
    ]
    return [run for run in runs if run.name == name] or runs
