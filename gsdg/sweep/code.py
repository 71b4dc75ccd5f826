"""A copy of the code a sweep was submitted with: its jobs run it, whatever happens to the checkout while they wait."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from gsdg.environment import NOT_CODE, PACKAGE
from gsdg.runs import write_json


def snapshot(into: Path, code: dict) -> Path:
    """`into`/<code>, which holds gsdg as it is now, and `code` in code.json. Made once; whole, or not at all."""
    place = into / code["code"]
    if not place.exists():
        temporary = into / f".{code['code']}.{uuid.uuid4().hex}"
        shutil.copytree(PACKAGE, temporary / "gsdg", ignore=shutil.ignore_patterns(*NOT_CODE))
        write_json(temporary / "code.json", code)
        try:
            os.rename(temporary, place)
        except OSError:
            if not place.exists():
                raise
            shutil.rmtree(temporary)  # another process was faster
    return place


def described(code: dict) -> str:
    """`3f2a... (commit 1b2c3d4, with changes that are not committed)`."""
    if code["commit"] is None:
        return f"{code['code']} (not in a git checkout)"
    changes = ", with changes that are not committed" if code["dirty"] else ""
    return f"{code['code']} (commit {code['commit'][:7]}{changes})"
