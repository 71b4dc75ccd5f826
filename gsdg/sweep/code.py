"""A copy of the code a sweep was submitted with: its jobs run it, whatever happens to the checkout while they wait."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path

from gsdg.environment import PACKAGE
from gsdg.own_code import code_files, own_modules
from gsdg.runs import write_json


def snapshot(into: Path, code: dict, configs: object = None) -> Path:
    """`into`/<name>: gsdg and the user's own modules that `configs` name, as they are now, and `code` in code.json.

    Its name is the code's fingerprint. Made once; whole, or not at all.
    """
    place = into / snapshot_name(code)
    if not place.exists():
        temporary = into / f".{place.name}.{uuid.uuid4().hex}"
        _copy(PACKAGE, temporary, "*")
        for path in own_modules(configs).values():
            _copy(path, temporary)
        write_json(temporary / "code.json", code)
        try:
            os.rename(temporary, place)
        except OSError:
            if not place.exists():
                raise
            shutil.rmtree(temporary)  # another process was faster
    return place


def snapshot_name(code: dict) -> str:
    """gsdg's fingerprint; with modules of the user's own, that of all together."""
    if not code.get("modules"):
        return code["code"]
    together = json.dumps([code["code"], code["modules"]], sort_keys=True)
    return hashlib.sha256(together.encode()).hexdigest()[:12]


def _copy(path: Path, into: Path, pattern: str = "*.py") -> None:
    for file in code_files(path, pattern):
        copy = into / file.relative_to(path.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
