"""The user's own modules that a config uses, and fingerprints (hashes) of code. Standard library only.

A module is the user's own if it belongs neither to gsdg nor to Python and is not in a site-packages folder.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

INSTALLED = {"site-packages", "dist-packages"}
NOT_CODE = {"__pycache__", *INSTALLED}


def fingerprint(path: Path, files: Iterable[Path]) -> str:
    """Twelve hex digits: a hash of the names and contents of these files of `path`."""
    return fingerprint_of(path, {file: file.read_bytes() for file in files})


def fingerprint_of(path: Path, contents: dict[Path, bytes]) -> str:
    """The same from contents that have been read already: {file: its bytes}, in the order of `code_files`."""
    total = hashlib.sha256()
    for file, content in contents.items():
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        total.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()[:12]


def code_files(path: Path, pattern: str = "*.py") -> list[Path]:
    """The sorted files in the folder `path` that match, without hidden files, caches and installed packages.

    If `path` is a file: that file.
    """
    if not path.is_dir():
        return [path]
    files = ((file, file.relative_to(path).parts) for file in path.rglob(pattern) if file.is_file())
    return sorted(file for file, parts in files if not NOT_CODE & {*parts} and not any(p[0] == "." for p in parts))


def own_modules(configs: object) -> dict[str, Path]:
    """The user's own modules that `configs` name by `_target_`, and those that these modules import, to any depth.

    Args:
        configs: a config, or a list of configs.

    Returns:
        {top-level name: the folder of the package, or the file of the module}, sorted by name.
    """
    modules: dict[str, Path] = {}
    names = [target.partition(".")[0] for target in targets(configs)]
    while names:
        name = names.pop()
        if name not in modules and (path := _own_path(name)):
            modules[name] = path
            names += [other for file in code_files(path) if file.suffix == ".py" for other in _imported(file)]
    return dict(sorted(modules.items()))


def targets(node: object) -> Iterator[str]:
    """Every `_target_` in a config, or in a list of configs."""
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        node = list(node.values())
    if isinstance(node, list | tuple):
        for value in node:
            yield from targets(value)


@cache
def _own_path(name: str) -> Path | None:
    """The folder or file of the user's own top-level module `name`; None if it is not the user's, or not found."""
    if name in ("gsdg", "__main__") or name in sys.stdlib_module_names:
        return None
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    paths = [Path(path).absolute() for path in folders or [spec.origin or ""] if path]
    own = [path for path in paths if path.exists() and not INSTALLED & set(path.parts)]
    return own[0] if own else None


def _imported(file: Path) -> set[str]:
    """The top-level names of all modules that a file imports, also inside functions."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    nodes = list(ast.walk(tree))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level and node.module]
    return {name.partition(".")[0] for name in names}
