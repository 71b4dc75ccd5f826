"""The copy of the code that the jobs of a sweep run, so that they do not depend on later changes of the checkout.

<runs_dir>/.code/<fingerprint>/
    gsdg/, <the user's own modules>
    code.json       the state of the code: fingerprints, commit
    files.json      {file: its SHA-256}: a job checks them when it starts (bootstrap.py)

Files of a copy may be removed by a clean-up of old files, or edited by mistake. So each submission compares every file
with the checkout and replaces the files that differ, one at a time, while jobs may be running from the copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from gsdg.runs.provenance import PACKAGE, package_files
from gsdg.runs.user_code import NOT_CODE, code_files, fingerprint_of, own_modules, targets
from gsdg.sweep import trust
from gsdg.utils.errors import UserError, listing

METADATA_FILES = ("code.json", "files.json")


def code_folder(runs_dir: Path) -> Path:
    """The folder for this user's copies: <runs_dir>/.code, or .code-<user id> if .code belongs to another user."""
    folder = runs_dir / ".code"
    is_of_another_user = folder.exists() and folder.stat().st_uid != os.geteuid()
    return runs_dir / f".code-{os.geteuid()}" if is_of_another_user else folder


def snapshot(into: Path, code: dict, configs: object = None) -> Path:
    """Copy gsdg and the user's own modules that `configs` name, as they are now.

    Args:
        into: the parent folder of the copies (`code_folder`).
        code: the result of `code_state(configs)`, which is saved in code.json.
        configs: the resolved configs of the runs.

    Returns:
        The folder of the copy, whose name is `snapshot_name(code)`.

    Raises:
        UserError: other users could write in the folder, or the code has changed since `code_state` was called.
    """
    files = _read_files(code, configs)
    folder = trust.private_folder(into) / snapshot_name(code)
    if folder.exists():
        trust.check_private(folder, recursive=True)
        _write_files(folder, files)
        return folder
    # A new copy is written under a temporary name: a job never finds an incomplete one under its own name.
    temporary = trust.private_folder(into / f".{folder.name}.{uuid.uuid4().hex}")
    _write_files(temporary, files)
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(temporary)  # another process has made the same copy meanwhile
    return folder


def snapshot_name(code: dict) -> str:
    """gsdg's fingerprint, or if there are modules of the user's own, one fingerprint of all of them."""
    if not code.get("modules"):
        return code["code"]
    fingerprints = json.dumps([code["code"], code["modules"]], sort_keys=True)
    return hashlib.sha256(fingerprints.encode()).hexdigest()[:12]


def check_modules_found(configs: object, directory: str) -> None:
    """UserError if Python cannot find the module of a `_target_`. directory: where the sweep was first launched."""
    names = {target.partition(".")[0] for target in targets(configs)} - {"gsdg", "torch"}
    if missing := sorted(name for name in names if name not in sys.modules and find_spec(name) is None):
        raise UserError(
            f"the configs name modules that are not found from here: {listing(missing)}.\n"
            f"Give the command in {directory}, where the sweep was launched, or with the same PYTHONPATH as there."
        )


def _read_files(code: dict, configs: object) -> dict[str, bytes]:
    """{path in the copy: content} of all its files. UserError if their fingerprints are no longer those in `code`."""
    sources = [(PACKAGE, package_files(), code["code"])]  # (path, its files, fingerprint)
    for name, path in own_modules(configs).items():
        sources.append((path, code_files(path), (code.get("modules") or {}).get(name)))
    files = {}
    for path, paths, fingerprint in sources:
        contents = {file: file.read_bytes() for file in paths}
        if fingerprint_of(path, contents) != fingerprint:
            raise UserError(f"{path} was changed while the sweep was submitted. Give the same command again.")
        files |= {file.relative_to(path.parent).as_posix(): content for file, content in contents.items()}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    metadata = zip(METADATA_FILES, (code, digests), strict=True)
    return files | {name: json.dumps(value, indent=2).encode() for name, value in metadata}


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make `folder` hold these files and no others. A job that reads a file meanwhile reads the old or the new one."""
    for name, content in files.items():
        if not _has_content(folder / name, content):
            _replace(folder, name, content)
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        is_temporary = name.name.startswith(".")  # written by `_replace` in another process
        kept = name.as_posix() in files or NOT_CODE & {*name.parts} or is_temporary
        if not kept and (file.is_symlink() or not file.is_dir()):
            file.unlink(missing_ok=True)


def _has_content(file: Path, content: bytes) -> bool:
    try:
        return not file.is_symlink() and file.read_bytes() == content
    except OSError:
        return False


def _replace(folder: Path, name: str, content: bytes) -> None:
    """Replace the file atomically and flush it to the disk. Only this user can write it, whatever the umask."""
    for parent in reversed(Path(name).parents):
        (folder / parent).mkdir(mode=0o755, exist_ok=True)
    temporary = (folder / name).with_name(f".{uuid.uuid4().hex}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    os.replace(temporary, folder / name)
