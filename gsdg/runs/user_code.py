"""Which code a run is made by beside gsdg: the user's own modules that its config names, and the hash of code.

A module is the user's own if it is neither gsdg's, nor Python's, nor in a site-packages folder. Standard library only.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

INSTALLED = {"site-packages", "dist-packages"}
NOT_CODE = {"__pycache__", *INSTALLED}


def fingerprint(path: Path, pattern: str = "*.py") -> str:
    """Twelve hex digits: the hash of the name and bytes of every file that `code_files` finds."""
    total = hashlib.sha256()
    for file in code_files(path, pattern):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        total.update(f"{name} {content}\n".encode())
    return total.hexdigest()[:12]


def code_files(path: Path, pattern: str = "*.py") -> list[Path]:
    """The file itself, or of a package's folder the files that match, but for hidden and installed ones, and caches."""
    if not path.is_dir():
        return [path]
    found = ((file, file.relative_to(path).parts) for file in path.rglob(pattern) if file.is_file())
    return sorted(file for file, parts in found if not NOT_CODE & {*parts} and not any(p[0] == "." for p in parts))


def own_modules(configs: object) -> dict[str, Path]:
    """{top-level name: its package's folder, or its file}: the user's own modules that `configs` (a config, or a list
    of them) name by `_target_`, and those that these import, to any depth; sorted by name."""
    found: dict[str, Path] = {}
    waiting = [target.partition(".")[0] for target in targets(configs)]
    while waiting:
        name = waiting.pop()
        if name not in found and (place := _own_place(name)):
            found[name] = place
            waiting += [other for file in code_files(place) if file.suffix == ".py" for other in _imported(file)]
    return dict(sorted(found.items()))


def targets(node: object) -> Iterator[str]:
    """Every `_target_` in a config."""
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        node = list(node.values())
    if isinstance(node, list | tuple):
        for value in node:
            yield from targets(value)


@cache
def _own_place(name: str) -> Path | None:
    """Where the user's own top-level module of that name is; None if it is another's, or is not there."""
    if name in ("gsdg", "__main__") or name in sys.stdlib_module_names:
        return None
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    places = [Path(place).absolute() for place in folders or [spec.origin or ""] if place]
    own = [place for place in places if place.exists() and not INSTALLED & set(place.parts)]
    return own[0] if own else None


def _imported(file: Path) -> set[str]:
    """The top-level names of the modules that a file imports, anywhere in it."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    nodes = list(ast.walk(tree))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level and node.module]
    return {name.partition(".")[0] for name in names}
