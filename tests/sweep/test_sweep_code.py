"""The copy of the code that jobs run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from gsdg.environment import PACKAGE, code_state, described_code
from gsdg.own_code import fingerprint
from gsdg.sweep.code import snapshot

ASK = """import gsdg, json, sys
from gsdg.environment import code_state
json.dump([gsdg.__file__, code_state(), sys.argv[1:]], sys.stdout)"""


def test_the_fingerprint_is_of_names_and_bytes(tmp_path):
    package = tmp_path / "package"
    shutil.copytree(PACKAGE, package)
    assert fingerprint(package, "*") == fingerprint(PACKAGE, "*") == code_state()["code"]
    (package / "__pycache__").mkdir(exist_ok=True)
    (package / "__pycache__" / "x.pyc").write_bytes(b"1")
    assert fingerprint(package, "*") == fingerprint(PACKAGE, "*")
    (package / "batch.py").rename(package / "batches.py")
    assert fingerprint(package, "*") != fingerprint(PACKAGE, "*")
    (package / "batches.py").rename(package / "batch.py")
    with (package / "batch.py").open("a") as file:
        file.write("\n")
    assert fingerprint(package, "*") != fingerprint(PACKAGE, "*")


def test_a_snapshot_is_made_once_and_whole(tmp_path):
    state = code_state()
    with ThreadPoolExecutor(8) as pool:
        places = set(pool.map(lambda _: snapshot(tmp_path / ".code", state), range(8)))
    (place,) = places
    assert [path.name for path in (tmp_path / ".code").iterdir()] == [state["code"]]
    assert fingerprint(place / "gsdg", "*") == state["code"]
    assert json.loads((place / "code.json").read_text()) == state


def test_start_runs_the_snapshot_from_anywhere_even_from_inside_a_checkout(tmp_path):
    place = snapshot(tmp_path / ".code", {"code": "abc", "commit": "1" * 40, "dirty": True})
    (place / "gsdg" / "ask.py").write_text(ASK)
    command = [sys.executable, str(place / "gsdg" / "sweep" / "start.py"), "-u", "-m", "gsdg.ask", "one", "-m", "two"]
    for directory in (PACKAGE.parent, tmp_path):
        said = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout
        file, state, arguments = json.loads(said)
        assert file == str(place / "gsdg" / "__init__.py")
        assert state == {"code": "abc", "commit": "1" * 40, "dirty": True, "modules": {}}
        assert arguments == ["one", "-m", "two"]


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"code": "abc", "commit": None, "dirty": None}, "abc (not in a git checkout)"),
        ({"code": "abc", "commit": "0123456789", "dirty": False}, "abc (commit 0123456)"),
        (
            {"code": "abc", "commit": "0123456789", "dirty": True},
            "abc (commit 0123456, with changes that are not committed)",
        ),
    ],
)
def test_how_code_is_named(state, text):
    assert described_code(state) == text
